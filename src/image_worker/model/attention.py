"""Ways to attend: from a block's queries, keys and values to what its next product reads.

Each row's tokens attend to each other only. `ATTENTION` chooses between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from image_worker.kernels import reference
from image_worker.kernels.reference import TASK, TILE, Activation

BACKENDS = [  # of torch's attention, best first; to be chosen around a forward
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Order:
    """How tokens stand for attention, N of all rows, in "joint order": each row's side by side.

    lengths: of each row; places (N): where in joint order the tokens stand, in stream order;
    rope (N, D / 2) complex64, stream order. The same with each row padded to whole tiles:
    owners (P) int32: which token is in a place, -1 for none; tasks (M, 4) int32: pieces of the
    rows' queries, as `kernels.attention` takes them.
    """

    lengths: tuple[int, ...]
    places: Tensor
    rope: Tensor
    owners: Tensor
    tasks: Tensor

    @classmethod
    def of(
        cls, lengths: Sequence[int], places: Tensor, rope: Tensor, device: torch.device
    ) -> Order:
        """places and rope: on any device."""
        stream = torch.empty_like(places)
        stream[places] = torch.arange(len(places))
        owners, tasks, start = [], [], 0
        for row in torch.split(stream, list(lengths)):
            padding = torch.full((-len(row) % TILE,), -1)
            owners += [row, padding]
            tasks += [
                (start + first, start, start + len(row), 0) for first in range(0, len(row), TASK)
            ]
            start += len(row) + len(padding)
        return cls(
            tuple(lengths),
            places.to(device),
            rope.to(device),
            torch.cat(owners).to(device, torch.int32),
            torch.tensor(tasks, dtype=torch.int32, device=device),
        )


class Attention(Protocol):
    """qkv (N, 3 · heads · D), norms (2, 2, D): as `reference.to_joint_heads` takes them.

    Returns (N, heads · D), stream order; round_to: FP8, int8, or None for qkv's own type.
    """

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
    ) -> Activation: ...


class Exact:
    """In the activations' own type, by torch's kernels."""

    def __init__(self, ops: Any) -> None:
        """ops: `kernels.fused` or `kernels.reference`."""
        self._ops = ops

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
    ) -> Activation:
        q, k, v = self._ops.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
        mixed = attend(q, k, v, order.lengths)
        found: Activation = self._ops.to_stream(mixed, order.places, round_to=round_to)
        return found


class Int8:
    """Queries and keys in int8, the rest in FP8: on Hopper, or slowly, as the reference."""

    def __init__(self, device: torch.device, cache: Path | None = None) -> None:
        """cache: a folder for compiled kernels."""
        self._attend = None
        if device.type == "cuda":
            from image_worker.kernels.attention import Attend

            self._attend = Attend(cache)

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
    ) -> Activation:
        if self._attend is None:
            q, k, v = reference.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
            mixed = reference.attend_int8(q, k, v, order.lengths)
            return reference.to_stream(mixed, order.places, round_to=round_to)
        from image_worker.kernels import fused

        tiles = self._attend.to_tiles(qkv, norms, order.rope, order.owners, text_tokens)
        mixed = self._attend(tiles, order.tasks, order.owners, len(qkv), norms.shape[-1])
        return mixed if round_to is None else fused.quantise(mixed, round_to)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention within each row: (N, heads, D) each to (N, heads · D), joint order."""
    if len(set(lengths)) == 1:  # as a batch, in one call
        rows = [tensor.view(len(lengths), lengths[0], *tensor.shape[1:]) for tensor in (q, k, v)]
        return _attend(*rows).reshape(len(q), -1)
    parts = zip(*(torch.split(part, list(lengths)) for part in (q, k, v)), strict=True)
    return torch.cat([_attend(*(part[None] for part in row)).flatten(2)[0] for row in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, heads, D) in and out. In this layout, seen through a transpose, cuDNN is fastest."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
