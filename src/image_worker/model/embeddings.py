"""Timesteps and positions, as the transformer reads them: functions of numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, int, int]  # frames (1), height, width, in tokens
SINUSOIDS = 256  # numbers that stand for a timestep
_BASE = 10000.0  # of all wavelengths


def embed_timestep(embedder: Any, timestep: Tensor) -> Tensor:
    """(N, width), in the type of timestep (N), which is in [0, 1].

    embedder: upstream's two layers, `linear_1` and `linear_2`.
    """
    hidden = embedder.linear_1(sinusoids(timestep).to(timestep.dtype))
    found: Tensor = embedder.linear_2(functional.silu(hidden))
    return found


def sinusoids(timestep: Tensor) -> Tensor:
    """(N, `SINUSOIDS`) float32 of timestep (N): cosines, then sines.

    Of Vaswani et al. (arXiv:1706.03762), section 3.5, at 1000 times the timestep.
    """
    half = SINUSOIDS // 2
    exponents = -math.log(_BASE) * torch.arange(half, device=timestep.device).float() / half
    angles = 1000 * (timestep.float()[:, None] * torch.exp(exponents))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rope(
    shapes: Sequence[Shape], text_tokens: int, axes: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Rotary positions of pictures and of their prompt, (tokens, D / 2) complex64 each.

    A token of a picture stands at the picture's number, at its row and at its column, both counted
    from the picture's centre. Prompts go on diagonally from where the largest picture ends.
    (RoFormer, arXiv:2104.09864; Qwen-Image, arXiv:2508.02324.)

    axes: how many of D numbers turn with each of the three.
    """
    pictures = torch.cat([_picture(number, shape, axes) for number, shape in enumerate(shapes)])
    start = max(side // 2 for _, *sides in shapes for side in sides)
    places = torch.arange(start, start + text_tokens)
    return pictures, torch.cat([_turns(places, size) for size in axes], dim=1)


@functools.lru_cache(maxsize=16)  # 2 MiB each at 1024²; prompts differ more than pictures' sizes
def _picture(number: int, shape: Shape, axes: tuple[int, int, int]) -> Tensor:
    frames, height, width = shape
    places = (torch.arange(number, number + frames), _centred(height), _centred(width))
    frame, row, column = (_turns(at, size) for at, size in zip(places, axes, strict=True))
    parts = (frame[:, None, None], row[None, :, None], column[None, None])
    return torch.cat([part.expand(*shape, -1) for part in parts], dim=-1).flatten(0, 2)


def _centred(count: int) -> Tensor:
    """`count` neighbouring places, half of them, rounded up, below 0."""
    return torch.arange(count) - (count - count // 2)


def _turns(places: Tensor, size: int) -> Tensor:
    """(places, size / 2) complex64, of length 1: a pair of numbers turns by one of them."""
    frequencies = 1.0 / torch.pow(_BASE, torch.arange(0, size, 2).float() / size)
    angles = torch.outer(places, frequencies)
    return torch.polar(torch.ones_like(angles), angles)
