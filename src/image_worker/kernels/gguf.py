"""Weights in ggml's blocks decoded, just before each product, to the type that is multiplied.

Blocks of all types have an even number of bytes, and few have one that 4 divides, so codes are read
16 bits at a time: two neighbours' each. A program's tile is (blocks, parts of a block, pairs of
values); what parts share is read by each, from the nearest cache. Values are computed as
`gguf_blocks` does it, to the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.gguf_blocks import NUMBERS
from image_worker.kernels.rounding import rounded

if TYPE_CHECKING:
    from image_worker.model.formats.gguf import GgufWeight

VALUES = 2048  # of one program
_VALUES = tl.constexpr(VALUES)
# Numbers are rounded after each product and sum, as in the definition: not fused.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def decode(weight: GgufWeight, into: Tensor, row_scales: Tensor | None) -> None:
    """As `reference.decode_gguf`. into: contiguous."""
    values, size = weight.block
    blocks = into.numel() // values
    kernel, constants = launch_of(weight.tensor_type, size)
    kernel[(triton.cdiv(into.numel(), VALUES),)](
        weight.data.view(NUMBERS.get(weight.tensor_type, torch.int16)),
        weight.data if row_scales is None else row_scales,
        into,
        blocks,
        into.shape[1] // values,
        SCALED=row_scales is not None,
        RUN=VALUES // values,
        **constants,
        **LAUNCH,
    )


def launch_of(tensor_type: str, size: int) -> tuple[Any, dict[str, int]]:
    """The kernel for a type whose blocks have `size` bytes, and what it has to know of it."""
    if tensor_type in NUMBERS:
        return _numbers_kernel, {}
    if tensor_type == "Q8_0":
        return _q8_kernel, {"SIZE": size}
    bits = int(tensor_type[1])
    if tensor_type.endswith("_K"):
        return _k_kernel, {"SIZE": size, "BITS": bits, "PARTS": 8 if bits in (4, 5) else 16}
    return _q4_q5_kernel, {"SIZE": size, "BITS": bits, "OFFSET": tensor_type.endswith("_1")}


@triton.jit
def _numbers_kernel(  # type: ignore[no-untyped-def]
    numbers,
    row_scales,
    into,
    count,
    columns,
    SCALED: tl.constexpr,
    RUN: tl.constexpr,
):
    """What is not coded, and stands among weights that are."""
    place = tl.program_id(0) * RUN + tl.arange(0, RUN)
    inside = place < count
    value = tl.load(numbers + place, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value /= tl.load(row_scales + place // columns, mask=inside, other=1.0)
    tl.store(into + place, rounded(value, into.dtype.element_ty), mask=inside)


@triton.jit
def _q8_kernel(  # type: ignore[no-untyped-def]
    words,
    row_scales,
    into,
    blocks,
    row_blocks,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    RUN: tl.constexpr,
):
    """Q8_0: a scale, and 32 values of a byte each."""
    block = (tl.program_id(0) * RUN + tl.arange(0, RUN))[:, None]
    inside = block < blocks
    pair = tl.arange(0, 16)[None, :]
    word = tl.load(words + block * (SIZE // 2) + 1 + pair, mask=inside, other=0).to(tl.int32)
    scale = _half(words, block, 0, SIZE, inside)
    earlier = scale * (word << 24 >> 24).to(tl.float32)
    later = scale * (word >> 8).to(tl.float32)
    row = block // row_blocks
    _store(into, earlier, later, row_scales, row, inside, blocks * 32, SCALED)


@triton.jit
def _q4_q5_kernel(  # type: ignore[no-untyped-def]
    words,
    row_scales,
    into,
    blocks,
    row_blocks,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    RUN: tl.constexpr,
):
    """Q4_0, Q4_1, Q5_0, Q5_1: byte i has the lower bits of values i and 16 + i."""
    block = (tl.program_id(0) * RUN + tl.arange(0, RUN))[:, None, None]
    inside = block < blocks
    half = tl.arange(0, 2)[None, :, None]
    pair = tl.arange(0, 8)[None, None, :]
    at = block * (SIZE // 2)
    word = tl.load(words + at + (SIZE // 2 - 8) + pair, mask=inside, other=0).to(tl.int32)
    word = word >> 4 * half
    earlier, later = word & 15, word >> 8 & 15
    if BITS == 5:
        high = tl.load(words + at + (SIZE // 2 - 10) + half, mask=inside, other=0).to(tl.int32)
        high = high >> 2 * pair
        earlier, later = earlier | (high & 1) << 4, later | (high >> 1 & 1) << 4
    scale = _half(words, block, 0, SIZE, inside)
    if OFFSET:
        offset = _half(words, block, 2, SIZE, inside)
        first = scale * earlier.to(tl.float32) + offset
        second = scale * later.to(tl.float32) + offset
    else:
        middle: tl.constexpr = 1 << BITS - 1
        first = scale * (earlier - middle).to(tl.float32)
        second = scale * (later - middle).to(tl.float32)
    row = block // row_blocks
    _store(into, first, second, row_scales, row, inside, blocks * 32, SCALED)


@triton.jit
def _k_kernel(  # type: ignore[no-untyped-def]
    words,
    row_scales,
    into,
    blocks,
    row_blocks,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    RUN: tl.constexpr,
):
    """Q2_K to Q6_K: a part is of the values that share a scale."""
    block = (tl.program_id(0) * RUN + tl.arange(0, RUN))[:, None, None]
    inside = block < blocks
    part = tl.arange(0, PARTS)[None, :, None]
    pair = tl.arange(0, 128 // PARTS)[None, None, :]
    # Which run of 32 values a pair is in, and where.
    run = part // (PARTS // 8)
    within = part % (PARTS // 8) * 8 + pair
    earlier, later = _codes(words + block * (SIZE // 2), run, within, inside, BITS)
    factor, offset = _factors(words + block * (SIZE // 2), part, inside, BITS)
    if BITS == 3:
        scale = _half(words, block, 108, SIZE, inside) * factor
    elif BITS == 6:
        scale = _half(words, block, 208, SIZE, inside) * factor
    else:
        scales: tl.constexpr = 80 if BITS == 2 else 0
        scale = _half(words, block, scales, SIZE, inside) * factor
        offset = _half(words, block, scales + 2, SIZE, inside) * offset
    first = scale * earlier.to(tl.float32)
    second = scale * later.to(tl.float32)
    if BITS != 3 and BITS != 6:
        first, second = first - offset, second - offset
    row = block // row_blocks
    _store(into, first, second, row_scales, row, inside, blocks * 256, SCALED)


@triton.jit
def _codes(block, run, within, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of two neighbours, as integers; block: its first word."""
    if BITS == 2:
        low = _word(block + 8 + run // 4 * 16 + within, inside) >> run % 4 * 2
        return low & 3, low >> 8 & 3
    if BITS == 3:
        low = _word(block + 16 + run // 4 * 16 + within, inside) >> run % 4 * 2
        high = _word(block + within, inside) >> run
        return (low & 3 | (high & 1) << 2) - 4, (low >> 8 & 3 | (high >> 8 & 1) << 2) - 4
    if BITS == 6:
        low = _word(block + run // 4 * 32 + run % 2 * 16 + within, inside) >> run % 4 // 2 * 4
        high = _word(block + 64 + run // 4 * 16 + within, inside) >> run % 4 * 2
        return (low & 15 | (high & 3) << 4) - 32, (low >> 8 & 15 | (high >> 8 & 3) << 4) - 32
    codes: tl.constexpr = 8 if BITS == 4 else 24
    low = _word(block + codes + run // 2 * 16 + within, inside) >> run % 2 * 4
    if BITS == 4:
        return low & 15, low >> 8 & 15
    high = _word(block + 8 + within, inside) >> run
    return low & 15 | (high & 1) << 4, low >> 8 & 15 | (high >> 8 & 1) << 4


@triton.jit
def _factors(block, part, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A part's scale and offset, in units of the block's; block: its first word."""
    if BITS == 2:
        both = _byte(block, part, inside)
        return (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    if BITS == 3:
        low = _byte(block, 96 + part % 8, inside) >> part // 8 * 4 & 15
        high = _byte(block, 104 + part % 4, inside) >> part // 4 * 2 & 3
        factor = ((low | high << 4) - 32).to(tl.float32)
        return factor, factor
    if BITS == 6:
        factor = (_byte(block, 192 + part, inside) << 24 >> 24).to(tl.float32)
        return factor, factor
    first = _byte(block, 4 + part % 4, inside)
    second = _byte(block, 8 + part % 4, inside)
    third = _byte(block, 12 + part % 4, inside)
    factor = tl.where(part < 4, first & 63, third & 15 | first >> 6 << 4)
    offset = tl.where(part < 4, second & 63, third >> 4 | second >> 6 << 4)
    return factor.to(tl.float32), offset.to(tl.float32)


@triton.jit
def _word(place, inside):  # type: ignore[no-untyped-def]
    """Two bytes, as an integer that may have the sign's bits on top."""
    return tl.load(place, mask=inside, other=0).to(tl.int32)


@triton.jit
def _byte(block, at, inside):  # type: ignore[no-untyped-def]
    """Byte `at` of a block, as an integer."""
    return _word(block + at // 2, inside) >> at % 2 * 8 & 255


@triton.jit
def _half(words, block, at, SIZE: tl.constexpr, inside):  # type: ignore[no-untyped-def]
    """The number in half precision at byte `at` of a block."""
    word = tl.load(words + block * (SIZE // 2) + at // 2, mask=inside, other=0)
    return word.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store(into, earlier, later, row_scales, row, inside, count, SCALED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's values, of `count` in all: pairs of neighbours, in their order."""
    if SCALED:
        scale = tl.load(row_scales + row, mask=inside, other=1.0)
        earlier, later = earlier / scale, later / scale
    dtype = into.dtype.element_ty
    both = tl.join(rounded(earlier, dtype), rounded(later, dtype))
    place = tl.program_id(0) * _VALUES + tl.arange(0, _VALUES)
    tl.store(into + place, tl.reshape(both, (_VALUES,)), mask=place < count)
