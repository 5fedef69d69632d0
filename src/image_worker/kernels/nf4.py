"""NF4 weights decoded to FP8: just before each product, into a buffer that all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from image_worker.model.linear import Nf4ByFp8

_ROWS, _COLUMNS = 16, 512  # of one program's tile


def decode(weight: Nf4ByFp8, into: Tensor) -> Tensor:
    """The weights in FP8, (rows, columns), in the memory of `into` (uint8 or FP8, large enough)."""
    rows, half = weight.codes.shape
    columns = 2 * half
    found = into.view(torch.float8_e4m3fn)[: rows * columns].view(rows, columns)
    layers = len(weight.offsets)
    programs = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _decode_kernel[programs](
        weight.codes,
        weight.scales,
        weight.levels,
        weight.scales_of_scales,
        weight.offsets,
        weight.grid,
        weight.row_scales,
        found,
        rows,
        columns,
        rows // layers,
        weight.scales_of_scales.stride(0),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return found


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    levels,
    scales_of_scales,
    offsets,
    grid,
    row_scales,
    found,
    rows,
    columns,
    layer_rows,
    layer_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    layer = row // layer_rows
    block = tl.program_id(1) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)
    blocks = columns // 64
    inside = (row < rows)[:, None] & (block < blocks)[None, :]
    # Counted from the layer's first block, as its scales of scales are.
    number = (row % layer_rows)[:, None] * blocks + block[None, :]
    level = tl.load(scales + row[:, None] * blocks + block[None, :], mask=inside, other=0)
    outer = layer[:, None] * layer_stride + number // 256
    scale = tl.load(levels + level.to(tl.int32)) * tl.load(
        scales_of_scales + outer, mask=inside, other=0.0
    )
    scale += tl.load(offsets + layer, mask=row < rows, other=0.0)[:, None]
    scale /= tl.load(row_scales + row, mask=row < rows, other=1.0)[:, None]

    pair = tl.arange(0, 32)[None, None, :]
    at = row[:, None, None] * columns + block[None, :, None] * 64
    byte = tl.load(codes + at // 2 + pair, mask=inside[:, :, None], other=0).to(tl.int32)
    first = tl.load(grid + (byte >> 4)) * scale[:, :, None]
    second = tl.load(grid + (byte & 15)) * scale[:, :, None]
    values = tl.reshape(tl.join(first, second), (ROWS, COLUMNS // 64, 64))
    column = tl.arange(0, 64)[None, None, :]
    tl.store(found + at + column, values.to(tl.float8e4nv), mask=inside[:, :, None])
