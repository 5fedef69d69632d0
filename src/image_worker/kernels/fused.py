"""The operations of `reference` as Triton kernels: one pass over memory each.

One program per token. Numbers are float32 inside, so results are nearer to the exact ones than the
reference's in bf16 are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels import fp8, gguf, heads, int8, nf4, products, svdq
from image_worker.kernels.reference import EPSILON, Activation, Quantised, streams
from image_worker.kernels.rounding import factor_of_token, rounded, store_rounded

if TYPE_CHECKING:
    from image_worker.model.formats.gguf import GgufWeight
    from image_worker.model.formats.nf4 import Nf4Weight
    from image_worker.model.formats.svdq import SvdqWeight

_FP16_MAX = tl.constexpr(65504.0)
_EPSILON = tl.constexpr(EPSILON)


def quantise(x: Tensor, round_to: torch.dtype) -> Quantised:
    """As `reference.quantise`."""
    return _to_quantised(x, None, round_to)


def to_stream(mixed: Tensor, places: Tensor, *, round_to: torch.dtype | None) -> Activation:
    """As `reference.to_stream`."""
    return mixed[places] if round_to is None else _to_quantised(mixed, places, round_to)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor, *, round_to: torch.dtype | None
) -> Activation:
    """As `reference.modulate`."""
    return _norm(x, None, (shift, scale), owner, round_to)[1]


def add(x: Tensor, y: Tensor, gate: Tensor, owner: Tensor) -> Tensor:
    """As `reference.add`."""
    return _norm(x, (y, gate), None, owner, None)[0]


def add_and_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    owner: Tensor,
    *,
    round_to: torch.dtype | None,
) -> tuple[Tensor, Activation]:
    """As `reference.add_and_modulate`."""
    addend = None if y is None or gate is None else (y, gate)
    return _norm(x, addend, (shift, scale), owner, round_to)


def gelu(x: Tensor, *, round_to: torch.dtype | None) -> Activation:
    """As `reference.gelu`."""
    tokens, width = x.shape
    found = _room(x, round_to)
    values, scales = _parts(found)
    shape = _shape(triton.cdiv(width, 3), per_warp=512)
    _gelu_kernel[(tokens,)](x, values, scales, width, ROUND=round_to is not None, **shape)
    return found


def multiply(
    x: Quantised, text_tokens: int, weight: Tensor, scales: Tensor, bias: Tensor
) -> Tensor:
    """As `reference.multiply`; but on Hopper, FP8 into bfloat16 only."""
    if int8.capability(weight.device) == (9, 0):
        return products.multiply(x, text_tokens, weight, scales, bias)
    into = x.values.new_empty(len(x.values), len(weight) // 2, dtype=x.dtype)
    for tokens, rows in streams(text_tokens, weight):
        if weight.dtype == torch.int8:
            int8.multiply(x[tokens], weight[rows], scales[rows], bias[rows], into[tokens])
        else:
            torch._scaled_mm(
                x[tokens].values,
                weight[rows].t(),
                scale_a=x[tokens].scales,
                scale_b=scales[rows].t(),
                bias=bias[rows],
                out_dtype=into.dtype,
                use_fast_accum=True,
                out=into[tokens],
            )
    return into


def to_joint_heads(
    qkv: Tensor, norms: Tensor, rope: Tensor, places: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.to_joint_heads`."""
    return heads.to_joint(qkv, norms, rope, places, text_tokens)


def decode_nf4(weight: Nf4Weight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """As `reference.decode_nf4`."""
    if row_scales is None:
        nf4.decode(weight, into)
    else:
        nf4.decode_rounded(weight, into, row_scales)


def decode_fp8(values: Tensor, scales: Tensor, into: Tensor) -> None:
    """As `reference.decode_fp8`."""
    fp8.decode(values, scales, into)


def decode_gguf(weight: GgufWeight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """As `reference.decode_gguf`."""
    gguf.decode(weight, into, row_scales)


def decode_svdq(weight: SvdqWeight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """As `reference.decode_svdq`."""
    svdq.decode(weight, into, row_scales)


def _to_quantised(x: Tensor, places: Tensor | None, round_to: torch.dtype) -> Quantised:
    width = x.shape[1]
    tokens = len(x) if places is None else len(places)
    found = _quantised_room(x, tokens, round_to)
    index = x if places is None else places
    gather = places is not None
    _quantise_kernel[(tokens,)](
        x, index, found.values, found.scales, width, GATHER=gather, **_shape(width)
    )
    return found


def _norm(
    x: Tensor,
    addend: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    owner: Tensor,
    round_to: torch.dtype | None,
) -> tuple[Tensor, Activation]:
    """x + gate · y where there is an addend, and its norm, modulated, where there is modulation."""
    tokens, width = x.shape
    y, gate = addend or (x, x)
    shift, scale = modulation or (x, x)
    strides = {part.stride(0) for pair in (addend and (gate,), modulation) for part in pair or ()}
    (stride,) = strides  # rows of all vectors are equally far from each other
    residual = torch.empty_like(x) if addend else x
    found = _room(x, round_to) if modulation else x
    values, scales = _parts(found)
    _norm_kernel[(tokens,)](
        x,
        y,
        gate,
        shift,
        scale,
        owner,
        residual,
        values,
        scales,
        width,
        stride,
        ADD=addend is not None,
        MODULATE=modulation is not None,
        ROUND=round_to is not None,
        CLIP=x.dtype == torch.float16,
        **_shape(width),
    )
    return residual, found


def _room(x: Tensor, round_to: torch.dtype | None) -> Activation:
    """For an activation of x's shape."""
    return torch.empty_like(x) if round_to is None else _quantised_room(x, len(x), round_to)


def _quantised_room(x: Tensor, tokens: int, round_to: torch.dtype) -> Quantised:
    values = x.new_empty(tokens, x.shape[1], dtype=round_to)
    return Quantised(values, x.new_empty(tokens, 1, dtype=torch.float32), x.dtype)


def _parts(room: Activation) -> tuple[Tensor, Tensor]:
    """Where a kernel writes values and scales: the latter nowhere, where there are none."""
    return (room.values, room.scales) if isinstance(room, Quantised) else (room, room)


def _shape(width: int, per_warp: int = 1024) -> dict[str, int]:
    """A block of a program; per_warp: values of it for each warp, what was fastest on an H200."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // per_warp))}


@triton.jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x, places, values, scales, width, GATHER: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    source = tl.load(places + token).to(tl.int64) if GATHER else token
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x + source * width + columns, mask=inside, other=0.0).to(tl.float32)
    store_rounded(row, values, scales, token, width, columns, inside)


@triton.jit
def _gelu_kernel(  # type: ignore[no-untyped-def]
    x, values, scales, width, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    # In thirds: blocks are powers of two, and the model's widths are three times one. This kernel
    # has so much to compute that a whole row in a block, a quarter of it idle, takes longer.
    token = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK)
    second = first + BLOCK
    third = second + BLOCK
    start = token * width
    row1 = _gelu(x + start, first, width)
    row2 = _gelu(x + start, second, width)
    row3 = _gelu(x + start, third, width)
    dtype = values.dtype.element_ty
    if ROUND:
        highest = tl.maximum(tl.maximum(tl.abs(row1), tl.abs(row2)), tl.abs(row3))
        factor = factor_of_token(tl.max(highest), row1 + row2 + row3, scales, token, dtype)
        row1, row2, row3 = row1 * factor, row2 * factor, row3 * factor
    tl.store(values + start + first, rounded(row1, dtype), mask=first < width)
    tl.store(values + start + second, rounded(row2, dtype), mask=second < width)
    tl.store(values + start + third, rounded(row3, dtype), mask=third < width)


@triton.jit
def _gelu(row, columns, width):  # type: ignore[no-untyped-def]
    x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is sigmoid(2u); the constant is 2 · sqrt(2 / pi).
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    gate,
    shift,
    scale,
    owner,
    residual,
    values,
    scales,
    width,
    stride,
    ADD: tl.constexpr,
    MODULATE: tl.constexpr,
    ROUND: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    vector = tl.load(owner + token).to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = token * width + columns
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        row += added * tl.load(gate + vector + columns, mask=inside, other=0.0).to(tl.float32)
        if CLIP:
            row = tl.minimum(tl.maximum(row, -_FP16_MAX), _FP16_MAX)
        stored = row.to(residual.dtype.element_ty)
        tl.store(residual + at, stored, mask=inside)
        row = stored.to(tl.float32)
    if MODULATE:
        row = tl.where(inside, row - tl.sum(row) / width, 0.0)
        row *= tl.rsqrt(tl.sum(row * row) / width + _EPSILON)
        factor = tl.load(scale + vector + columns, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + vector + columns, mask=inside, other=0.0).to(tl.float32)
        row = row * (1 + factor) + offset
        if ROUND:
            store_rounded(row, values, scales, token, width, columns, inside)
        else:
            tl.store(values + at, row.to(values.dtype.element_ty), mask=inside)
