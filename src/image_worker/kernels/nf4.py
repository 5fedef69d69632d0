"""NF4 weights decoded, just before each product: to FP8 or int8, or to a wider type.

A block of 64 weights can only become 16 values. For FP8 and int8 each block's values are computed
once, packed into four registers, and weights are looked up there, four at a time, by the
instruction that permutes bytes. For wider types, of which twice as many bytes are written, each
weight is looked up and scaled by itself, to the bits of its definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.rounding import to_int8

if TYPE_CHECKING:
    from image_worker.model.formats.nf4 import Nf4Weight

_ROWS, _BLOCKS = 8, 16  # of one program's tile, for FP8 and int8
_RUN = 64  # blocks of one program, for wider types
# Scales are rounded after their product and after their sum, as torch does it: not fused.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_WORDS = 8  # of 32 bits in a block of 64 weights
# Triton's interpreter knows no PTX: there the same is computed in its own words.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def decode(weight: Nf4Weight, into: Tensor) -> None:
    """As `reference.decode_nf4` without scales of rows. into: contiguous, bf16, fp16 or float32."""
    blocks = weight.scales.numel()
    _decode_kernel[(triton.cdiv(blocks, _RUN),)](
        weight.codes,
        weight.scales,
        weight.levels,
        weight.scales_of_scales,
        weight.offsets,
        weight.grid,
        into,
        blocks,
        blocks // len(weight.offsets),
        weight.scales_of_scales.stride(0),
        RUN=_RUN,
        **LAUNCH,
    )


def decode_rounded(weight: Nf4Weight, into: Tensor, row_scales: Tensor) -> None:
    """As `reference.decode_nf4` into FP8 or int8. into: contiguous."""
    rows, columns = into.shape
    programs = (triton.cdiv(rows, _ROWS), triton.cdiv(columns // 64, _BLOCKS))
    _decode_rounded_kernel[programs](
        weight.codes.view(torch.int32),
        weight.scales,
        weight.levels,
        weight.scales_of_scales,
        weight.offsets,
        weight.grid,
        row_scales,
        into.view(torch.int32),
        rows,
        columns // 64,
        rows // len(weight.offsets),
        weight.scales_of_scales.stride(0),
        ROWS=_ROWS,
        BLOCKS=_BLOCKS,
        WORDS=_WORDS,
        INT8=into.dtype == torch.int8,
        num_warps=4,
    )


@triton.jit
def _decode_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    levels,
    scales_of_scales,
    offsets,
    grid,
    into,
    blocks,
    layer_blocks,
    layer_stride,
    RUN: tl.constexpr,
):
    block = (tl.program_id(0) * RUN + tl.arange(0, RUN))[:, None]
    inside = block < blocks
    pair = tl.arange(0, 32)[None, :]
    code = tl.load(codes + block * 32 + pair, mask=inside, other=0).to(tl.int32)

    layer = block // layer_blocks
    outer = layer * layer_stride + block % layer_blocks // 256
    scale = _scale(scales + block, levels, scales_of_scales + outer, inside)
    scale += tl.load(offsets + layer, mask=inside, other=0.0)

    dtype = into.dtype.element_ty
    earlier = (tl.load(grid + (code >> 4)) * scale).to(dtype)
    later = (tl.load(grid + (code & 15)) * scale).to(dtype)
    both = tl.reshape(tl.join(earlier, later), (RUN, 64))
    tl.store(into + block * 64 + tl.arange(0, 64)[None, :], both, mask=inside)


@triton.jit
def _decode_rounded_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    levels,
    scales_of_scales,
    offsets,
    grid,
    row_scales,
    found,
    rows,
    blocks,
    layer_rows,
    layer_stride,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    INT8: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    layer = row // layer_rows
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    inside = (row < rows) & (block < blocks)
    at = row * blocks + block
    word = tl.arange(0, WORDS)[None, None, :]
    packed = tl.load(codes + at[:, :, None] * WORDS + word, mask=inside[:, :, None], other=0)

    # Counted from the layer's first block, as its scales of scales are.
    number = row % layer_rows * blocks + block
    outer = layer * layer_stride + number // 256
    scale = _scale(scales + at, levels, scales_of_scales + outer, inside)
    scale += tl.load(offsets + layer, mask=row < rows, other=0.0)
    scale /= tl.load(row_scales + row, mask=row < rows, other=1.0)
    scale = scale[:, :, None]

    values0 = _four_values(grid, scale, INT8)
    values1 = _four_values(grid + 4, scale, INT8)
    values2 = _four_values(grid + 8, scale, INT8)
    values3 = _four_values(grid + 12, scale, INT8)
    # Hex digit i of `within` says which of eight values code i means, of the lower or of the higher
    # eight. Both are looked up, four codes at a time; digit i of `choice`, i modulo 4 and 4 more
    # where the code is 8 or more, then takes byte i of the former or the latter.
    within = packed & 0x77777777
    choice = (packed >> 1 & 0x44444444) ^ 0x32103210
    first = _look_up(values0, values1, values2, values3, within, choice)
    second = _look_up(values0, values1, values2, values3, within >> 16, choice >> 16)
    both = tl.reshape(tl.join(first, second), (ROWS, BLOCKS, 2 * WORDS))
    target = tl.arange(0, 2 * WORDS)[None, None, :]
    tl.store(found + at[:, :, None] * (2 * WORDS) + target, both, mask=inside[:, :, None])


@triton.jit
def _scale(scales, levels, scales_of_scales, inside):  # type: ignore[no-untyped-def]
    """Of blocks, without their layer's offset."""
    level = tl.load(levels + tl.load(scales, mask=inside, other=0).to(tl.int32))
    return level * tl.load(scales_of_scales, mask=inside, other=0.0)


@triton.jit
def _four_values(grid, scale, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four of the grid's values, scaled, in FP8 or int8: the first in the lowest byte."""
    a = tl.load(grid) * scale
    b = tl.load(grid + 1) * scale
    c = tl.load(grid + 2) * scale
    d = tl.load(grid + 3) * scale
    if _INTERPRETED:
        return _byte(a, INT8) | _byte(b, INT8) << 8 | _byte(c, INT8) << 16 | _byte(d, INT8) << 24
    if INT8:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 a, b, c, d, high; cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2;"
            " cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;"
            " cvt.pack.sat.s8.s32.b32 high, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, high; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte(value, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
    rounded = to_int8(value) if INT8 else value.to(tl.float8e4nv)
    return rounded.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _look_up(values0, values1, values2, values3, within, choice):  # type: ignore[no-untyped-def]
    """The values of four codes, by the lower halves of `within` and `choice`."""
    low = _permute(values0, values1, within)
    high = _permute(values2, values3, within)
    # Within a byte the earlier code is in the higher half: swapped, they are in order.
    return _permute(_permute(low, high, choice), 0, 0x2301)


@triton.jit
def _permute(low, high, selector):  # type: ignore[no-untyped-def]
    """Of eight bytes, in `low` and `high`, the four that the selector's lowest hex digits count."""
    if _INTERPRETED:
        return (
            _chosen(low, high, selector)
            | _chosen(low, high, selector >> 4) << 8
            | _chosen(low, high, selector >> 8) << 16
            | _chosen(low, high, selector >> 12) << 24
        )
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [low, high, selector],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _chosen(low, high, number):  # type: ignore[no-untyped-def]
    return tl.where(number & 4 != 0, high, low) >> (number & 3) * 8 & 0xFF
