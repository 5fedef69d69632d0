"""SVDQuant weights decoded, just before each product: to FP8 or int8, or to a wider type.

A program makes one tile of one layer: the product of its low-rank factors by the tensor cores, in
which sums are float32, and on top of it the codes, scaled. A byte has the codes of two neighbours:
so even columns are a tile, and odd ones another, and they are joined in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.rounding import rounded

if TYPE_CHECKING:
    from image_worker.model.formats.svdq import SvdqWeight

# Of a tile: rows; groups of 64 columns; how much of the rank is multiplied at a time.
SIZES = {"ROWS": 128, "GROUPS": 1, "DEPTH": 32}
LAUNCH = {"num_warps": 4}
# Triton's interpreter multiplies no bf16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def decode(weight: SvdqWeight, into: Tensor, row_scales: Tensor | None) -> None:
    """As `reference.decode_svdq`. into: contiguous."""
    layers, rank, columns = weight.down.shape
    height, groups = len(weight.codes) // layers, columns // 64
    tiles = triton.cdiv(groups, SIZES["GROUPS"]), layers * triton.cdiv(height, SIZES["ROWS"])
    _svdq_kernel[tiles](
        weight.codes,
        weight.scales,
        weight.inverse,
        weight.down,
        weight.up,
        into if row_scales is None else row_scales,
        into,
        height,
        groups,
        RANK=rank,
        ROUND=row_scales is not None,
        **SIZES,
        **LAUNCH,
    )


@triton.jit
def _svdq_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    inverse,
    down,
    up,
    row_scales,
    into,
    height,
    groups,
    RANK: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(height, ROWS)
    layer = (tl.program_id(1) // tiles).to(tl.int64)
    within = tl.program_id(1) % tiles * ROWS + tl.arange(0, ROWS)
    row = (layer * height + within)[:, None]
    is_row = (within < height)[:, None]
    first = tl.program_id(0) * GROUPS
    pair = first * 32 + tl.arange(0, GROUPS * 32)
    is_pair = pair < groups * 32

    even = tl.zeros((ROWS, GROUPS * 32), dtype=tl.float32)
    odd = tl.zeros((ROWS, GROUPS * 32), dtype=tl.float32)
    for start in range(0, RANK, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        is_depth = depth < RANK
        left = tl.load(up + row * RANK + depth[None, :], is_row & is_depth[None, :], 0.0)
        at = down + (layer * RANK + depth[:, None]) * groups * 64 + 2 * pair[None, :]
        inside = is_depth[:, None] & is_pair[None, :]
        even = _add_product(left, tl.load(at, inside, 0.0), even)
        odd = _add_product(left, tl.load(at + 1, inside, 0.0), odd)

    inside = is_row & is_pair[None, :]
    code = tl.load(codes + row * groups * 32 + pair[None, :], inside, 0).to(tl.int32)
    group = first + tl.arange(0, GROUPS)[None, :]
    scale = tl.load(scales + row * groups + group, is_row & (group < groups), 0.0).to(tl.float32)
    if ROUND:
        factor = 1 / tl.load(row_scales + row, is_row, 1.0)
        even, odd, scale = even * factor, odd * factor, scale * factor
    scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, 32))
    scale = tl.reshape(scale, (ROWS, GROUPS * 32))
    at = inverse + layer * groups * 64 + 2 * pair[None, :]
    even += _signed(code & 15) * scale * tl.load(at, is_pair[None, :], 0.0)
    odd += _signed(code >> 4) * scale * tl.load(at + 1, is_pair[None, :], 0.0)

    dtype = into.dtype.element_ty
    both = tl.reshape(tl.join(rounded(even, dtype), rounded(odd, dtype)), (ROWS, GROUPS * 64))
    column = first * 64 + tl.arange(0, GROUPS * 64)[None, :]
    tl.store(into + row * groups * 64 + column, both, is_row & (column < groups * 64))


@triton.jit
def _add_product(left, right, sums):  # type: ignore[no-untyped-def]
    """Exact products of 16-bit numbers, or of float32."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _signed(code):  # type: ignore[no-untyped-def]
    """Of four bits, as a number."""
    return ((code ^ 8) - 8).to(tl.float32)
