"""The vision tower of Qwen2.5-VL: patches of pictures to tokens that the language model reads.

Computes what transformers' `Qwen2_5_VisionTransformerPretrainedModel` computes, under the same
parameter names. Most layers attend within windows; tokens are put in an order in which a window's
patches follow each other, and windows of one size too, so that those are one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from image_worker.model.stream import Blocks
from image_worker.model.text_config import VisionConfig
from image_worker.model.text_layers import GatedMlp, Linear, RmsNorm, Rope, frequencies, rope, turn

Grid = tuple[int, int]  # a picture's rows and columns of patches
Run = tuple[int, int]  # how many stretches of patches, one after the other, and of which length
_EPSILON = 1e-6  # of all norms; in no configuration


class VisionTower(nn.Module):
    """One or more pictures at a time; none sees another."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._config = config
        self.patch_embed = PatchEmbedding(config)
        self.blocks = Blocks([VisionLayer(config) for _ in range(config.layers)])
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(patches, values) of pictures one after the other to (tokens, width), in that order.

        patches: those that become one token follow each other.
        """
        layout = Layout.of(grids, self._config)
        weight = self.patch_embed.proj.weight
        order, back = layout.order.to(weight.device), layout.order.argsort().to(weight.device)
        turns = rope(layout.angles, weight.device, torch.float32)
        x = patches.to(weight.device, weight.dtype)
        x = self.patch_embed(_in_order(x, order))
        for number, block in enumerate(self.blocks.in_turn()):
            runs = layout.pictures if number in self._config.full else layout.windows
            x = block(x, turns, runs)
        found: Tensor = self.merger(x)
        return found[back]


@dataclass(frozen=True)
class Layout:
    """Where patches stand, for pictures of given grids; on the CPU.

    order (tokens): which token comes next; angles (patches, head / 2): of each patch, in that
    order; windows, pictures: stretches of patches that see each other.
    """

    order: Tensor
    angles: Tensor
    windows: tuple[Run, ...]
    pictures: tuple[Run, ...]

    @classmethod
    def of(cls, grids: Sequence[Grid], config: VisionConfig) -> Layout:
        """grids: in whole tokens."""
        merge = config.merge
        windows: list[Tensor] = []
        start = 0
        for rows, columns in grids:
            windows += _windows(start, rows // merge, columns // merge, config.window)
            start += rows * columns // merge**2
        order = torch.cat(windows)
        angles = torch.cat([_angles(grid, config) for grid in grids])
        return cls(
            order,
            _in_order(angles, order),
            _runs(len(window) * merge**2 for window in windows),
            _runs(rows * columns for rows, columns in grids),
        )


class VisionLayer(nn.Module):
    """Attention, then an MLP, each on top of what was there."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.width, _EPSILON)
        self.norm2 = RmsNorm(config.width, _EPSILON)
        self.attn = VisionAttention(config)
        self.mlp = GatedMlp(config.width, config.inner, bias=True)

    def forward(self, x: Tensor, turns: Rope, runs: Sequence[Run]) -> Tensor:
        """(patches, width) in and out."""
        x = x + self.attn(self.norm1(x), turns, runs)
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class VisionAttention(nn.Module):
    """Each patch sees those of its own stretch: its window, or its picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, turns: Rope, runs: Sequence[Run]) -> Tensor:
        """(patches, width) in and out."""
        q, k, v = self.qkv(x).unflatten(1, (3, self._heads, -1)).unbind(1)
        # Turned in float32, as upstream has it, whatever the model computes in.
        q, k = (turn(one.float(), turns).to(x.dtype) for one in (q, k))
        lengths = [count * length for count, length in runs]
        parts = zip(*(one.split(lengths) for one in (q, k, v)), runs, strict=True)
        found: Tensor = self.proj(torch.cat([_attend(*part) for part in parts]))
        return found


class PatchEmbedding(nn.Module):
    """Pixels to numbers: one matrix, stored as the kernel of a convolution."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.frames, config.patch, config.patch)
        self.proj = nn.Conv3d(config.channels, config.width, kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, values) to (patches, width)."""
        # The kernel is as large as a patch, so no convolution is needed, nor its library.
        return functional.linear(patches, self.proj.weight.flatten(1))


class Merger(nn.Module):
    """The patches of a token to the token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._inner = config.width * config.merge**2
        self.ln_q = RmsNorm(config.width, _EPSILON)
        self.mlp = nn.Sequential(
            Linear(self._inner, self._inner), nn.GELU(), Linear(self._inner, config.out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(patches, width) to (tokens, width of the language model)."""
        found: Tensor = self.mlp(self.ln_q(x).view(-1, self._inner))
        return found


def _attend(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    """Of stretches of one length, each for itself: (patches, heads, head) to (patches, width)."""
    q, k, v = (one.view(*run, *one.shape[1:]).transpose(1, 2) for one in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """x (patches, ...), those of a token together, token by token as `order` (tokens) says."""
    return x.reshape(len(order), -1, x.shape[-1])[order].flatten(0, 1)


def _windows(start: int, rows: int, columns: int, side: int) -> list[Tensor]:
    """A picture's tokens, counted from `start`, window by window, those of one size together.

    Windows at the right and at the bottom are cut off by the picture's edge.
    """
    tokens = torch.arange(start, start + rows * columns).view(rows, columns)
    found = [
        part.flatten()
        for band in torch.split(tokens, side)
        for part in torch.split(band, side, dim=1)
    ]
    return sorted(found, key=len)


def _runs(lengths: Iterable[int]) -> tuple[Run, ...]:
    """Stretches of equal lengths, where they follow each other."""
    return tuple((len(list(same)), length) for length, same in itertools.groupby(lengths))


def _angles(grid: Grid, config: VisionConfig) -> Tensor:
    """By which a picture's patches are turned, (patches, head / 2): half by row, half by column.

    In the patches' order: token by token, and row by row within a token.
    """
    rows, columns = grid
    merge = config.merge
    places = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ).view(2, rows // merge, merge, columns // merge, merge)
    places = places.transpose(2, 3).flatten(1)
    by_axis = places[..., None] * frequencies(config.head // 4, config.theta)
    return torch.cat(by_axis.unbind(0), dim=-1)
