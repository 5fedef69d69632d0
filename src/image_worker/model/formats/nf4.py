"""NF4: 4-bit values on a normal-quantile grid, in blocks of 64 with one scale each.

The scales are quantised themselves, to 8 bits in blocks of 256 ("double quantisation"): 0.9 GiB
less for the transformer (Dettmers et al., 2023, QLoRA). bitsandbytes quantises, once; what it found
is decoded by `kernels/`, without it, since its import takes seconds of a start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.kernels import operations
from image_worker.kernels.reference import nf4_scales
from image_worker.model.formats.coded import Coded, CodedLinear
from image_worker.model.packed import joined

BLOCK = 64
SCALE_BLOCK = 256


class Nf4Weight(Coded):
    """Weights (rows, columns) of layers of one shape, one layer below the other.

    codes (rows, columns / 2) uint8: of two values each, the earlier one's in the higher half;
    scales (rows, columns / 64) uint8: a code for each block; scales_of_scales (layers, blocks of a
    layer / 256, rounded up) and offsets (layers) float32. levels (256) and grid (16), float32, are
    what codes of scales and of values mean. A block's scale is its level times its scale of scales,
    plus the offset; a value is its number of the grid times its block's scale.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        scales_of_scales: Tensor,
        offsets: Tensor,
        levels: Tensor,
        grid: Tensor,
    ) -> None:
        super().__init__()
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(scales)
        self.scales_of_scales = nn.Buffer(scales_of_scales)
        self.offsets = nn.Buffer(offsets)
        self.levels = nn.Buffer(levels)
        self.grid = nn.Buffer(grid)

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """All of them, of one shape, as one."""
        return cls(
            joined([weight.codes for weight in weights]),
            joined([weight.scales for weight in weights]),
            joined([weight.scales_of_scales for weight in weights]),
            joined([weight.offsets for weight in weights]),
            weights[0].levels,
            weights[0].grid,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, half = self.codes.shape
        return rows, 2 * half

    def decode(self, into: Tensor, row_scales: Tensor | None = None) -> None:
        """As of `Coded`."""
        operations(into.device).decode_nf4(self, into, row_scales)

    def largest(self) -> Tensor:
        """As of `Coded`: the grid ends at ±1, so these are scales of blocks."""
        return nf4_scales(self).amax(dim=1, keepdim=True)


def encode(weight: Tensor, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """A layer that holds `weight` (out, in), quantised on the device it is on.

    Raises:
        ModelMismatch: its rows cannot be cut into blocks.
    """
    from bitsandbytes.functional import quantize_4bit

    rows, columns = weight.shape
    if columns % BLOCK:
        raise ModelMismatch(f"NF4 stores rows of a multiple of {BLOCK} weights, not of {columns}")
    codes, state = quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return CodedLinear(
        Nf4Weight(
            codes.view(rows, -1),
            state.absmax.view(rows, -1),
            state.state2.absmax[None],
            state.offset[None],
            state.state2.code,
            state.code,
        )
    )


def empty(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """The same layer, its tensors on the meta device."""
    blocks = rows * columns // BLOCK

    def codes(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    return CodedLinear(
        Nf4Weight(
            codes(rows, columns // 2),
            codes(rows, columns // BLOCK),
            numbers(1, -(-blocks // SCALE_BLOCK)),
            numbers(1),
            numbers(256),
            numbers(16),
        )
    )


def size(rows: int, columns: int) -> int:
    """Bytes: half a byte a value, one a block, four a block of blocks."""
    values = rows * columns
    blocks = -(-values // BLOCK)
    return values // 2 + blocks + 4 * -(-blocks // SCALE_BLOCK)
