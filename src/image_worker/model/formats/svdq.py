"""SVDQuant: a low-rank part in 16 bits, and what it leaves in int4 (Li et al., 2024).

Inputs are smoothed, too: each channel is divided by a factor, and its weights are multiplied by it
before they are rounded. nunchaku's files are of this kind (`nunchaku.py`); `decomposition.py` finds
all that for a weight of 16 bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.kernels import operations
from image_worker.model.formats.coded import Coded, CodedLinear
from image_worker.model.formats.decomposition import GROUP, decompose
from image_worker.model.packed import joined

RANK = 32  # of low-rank parts, unless another one is asked for: as in most published files
_PIECE = 1024  # rows at a time in 32 bits: cards are planned without room for all of them


class SvdqWeight(Coded):
    """Weights (rows, columns) of layers of one shape, one layer below the other.

    A weight is code · scale · inverse + up · down. codes (rows, columns / 2) uint8: of two signed
    4-bit values each, the earlier one's in the lower half; scales (rows, columns / 64); inverse
    (layers, columns) float32: 1 over what inputs are divided by; down (layers, rank, columns) and
    up (rows, rank), which are of one type. That and the scales' is bf16, fp16 or float32.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, inverse: Tensor, down: Tensor, up: Tensor
    ) -> None:
        super().__init__()
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(scales)
        self.inverse = nn.Buffer(inverse)
        self.down = nn.Buffer(down)
        self.up = nn.Buffer(up)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, half = self.codes.shape
        return rows, 2 * half

    @property
    def kind(self) -> Hashable:
        """As of `Coded`: the rank and all types."""
        return type(self), self.up.shape[1], self.scales.dtype, self.up.dtype

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """All of them, of one shape and kind, as one."""
        return cls(
            joined([weight.codes for weight in weights]),
            joined([weight.scales for weight in weights]),
            joined([weight.inverse for weight in weights]),
            joined([weight.down for weight in weights]),
            joined([weight.up for weight in weights]),
        )

    def decode(self, into: Tensor, row_scales: Tensor | None = None) -> None:
        """As of `Coded`."""
        operations(into.device).decode_svdq(self, into, row_scales)

    def largest(self) -> Tensor:
        """As of `Coded`, without all weights in 32 bits at a time."""
        found = [piece.abs_().amax(dim=1, keepdim=True) for _, piece in self.pieces()]
        return torch.cat(found)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights in float32, and which rows they are: some rows of one layer at a time."""
        pairs = _pairs(self.codes.device)
        layers, columns = self.inverse.shape
        height = len(self.codes) // layers
        for layer in range(layers):
            down = self.down[layer].float()
            for first in range(layer * height, (layer + 1) * height, _PIECE):
                rows = slice(first, min(first + _PIECE, (layer + 1) * height))
                values = pairs.index_select(0, self.codes[rows].int().flatten())
                piece = values.view(torch.float32).view(-1, GROUP)
                piece *= self.scales[rows].float().view(-1, 1)
                piece = piece.view(-1, columns).mul_(self.inverse[layer])
                yield rows, piece.add_(self.up[rows].float() @ down)


def _pairs(device: torch.device) -> Tensor:
    """The two values that each byte stands for: two float32 as one number of 64 bits, (256) int64.

    A CPU looks these up in half the time that it takes for rows of two.
    """
    values = (torch.arange(16, device=device) ^ 8) - 8
    lower = values.float().expand(16, 16)
    return torch.stack([lower, lower.t()], dim=2).view(torch.int64).flatten()


def encode(
    weight: Tensor,
    bias: bool,  # noqa: ARG001
    dtype: torch.dtype,  # noqa: ARG001
    *,
    rank: int = RANK,
    ranges: Tensor | None = None,
) -> nn.Module:
    """A layer that holds `weight` (out, in), quantised on the device it is on.

    rank: of the low-rank part, if the weight has as many rows and columns; ranges (in): as of
    `decompose`.

    Raises:
        ModelMismatch: its rows cannot be cut into groups.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise ModelMismatch(
            f"SVDQuant stores rows of a multiple of {GROUP} weights, not of {columns}"
        )
    found = decompose(weight, min(rank, rows, columns), ranges)
    return CodedLinear(
        SvdqWeight(found.codes, found.scales, found.inverse[None], found.down[None], found.up)
    )


def empty(
    rows: int,
    columns: int,
    bias: bool,  # noqa: ARG001
    dtype: torch.dtype,  # noqa: ARG001
    *,
    rank: int = RANK,
) -> nn.Module:
    """The same layer, its tensors on the meta device."""
    rank = min(rank, rows, columns)

    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return CodedLinear(
        SvdqWeight(
            numbers(rows, columns // 2, dtype=torch.uint8),
            numbers(rows, columns // GROUP),
            numbers(1, columns, dtype=torch.float32),
            numbers(1, rank, columns),
            numbers(rows, rank),
        )
    )


def size(rows: int, columns: int, *, rank: int = RANK) -> int:
    """Bytes: half a byte a value, two a group and a number of a factor, four a column."""
    rank = min(rank, rows, columns)
    groups = rows * columns // GROUP
    return rows * columns // 2 + 2 * groups + 2 * rank * (rows + columns) + 4 * columns
