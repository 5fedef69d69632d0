"""The operations of `reference` as Triton kernels: one pass over memory each.

One program per token. Numbers are float32 inside, so results are nearer to the exact ones than the
reference's in bf16 are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.reference import EPSILON, FP8, Activation, Quantised

_LEAST_AMAX = tl.constexpr(1e-12)
_FP8_MAX = tl.constexpr(448.0)
_FP16_MAX = tl.constexpr(65504.0)
_EPSILON = tl.constexpr(EPSILON)


def quantise(x: Tensor) -> Quantised:
    """As `reference.quantise`."""
    return _to_quantised(x, None)


def to_stream(mixed: Tensor, places: Tensor, *, fp8: bool) -> Activation:
    """As `reference.to_stream`."""
    return _to_quantised(mixed, places) if fp8 else mixed[places]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor, *, fp8: bool) -> Activation:
    """As `reference.modulate`."""
    return _norm(x, None, (shift, scale), owner, fp8=fp8)[1]


def add(x: Tensor, y: Tensor, gate: Tensor, owner: Tensor) -> Tensor:
    """As `reference.add`."""
    return _norm(x, (y, gate), None, owner, fp8=False)[0]


def add_and_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    owner: Tensor,
    *,
    fp8: bool,
) -> tuple[Tensor, Activation]:
    """As `reference.add_and_modulate`."""
    addend = None if y is None or gate is None else (y, gate)
    return _norm(x, addend, (shift, scale), owner, fp8=fp8)


def gelu(x: Tensor, *, fp8: bool) -> Activation:
    """As `reference.gelu`."""
    tokens, width = x.shape
    values, scales = _room(x, fp8=fp8)
    shape = _shape(triton.cdiv(width, 3), per_warp=512)
    _gelu_kernel[(tokens,)](x, values, scales, width, FP8=fp8, **shape)
    return Quantised(values, scales) if fp8 else values


def to_joint_heads(
    qkv: Tensor, norms: Tensor, rope: Tensor, places: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.to_joint_heads`."""
    tokens, size = len(qkv), norms.shape[-1]
    heads = qkv.shape[1] // 3 // size
    joint = torch.empty(3, tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    _heads_kernel[(tokens, 3)](
        qkv,
        norms,
        torch.view_as_real(rope),
        places,
        joint,
        tokens,
        text_tokens,
        heads,
        SIZE=size,
        HEADS=triton.next_power_of_2(heads),
        num_warps=4,
    )
    return joint[0], joint[1], joint[2]


def _to_quantised(x: Tensor, places: Tensor | None) -> Quantised:
    tokens, width = x.shape
    values, scales = _room(x, fp8=True)
    index = x if places is None else places
    gather = places is not None
    _quantise_kernel[(tokens,)](x, index, values, scales, width, GATHER=gather, **_shape(width))
    return Quantised(values, scales)


def _norm(
    x: Tensor,
    addend: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    owner: Tensor,
    *,
    fp8: bool,
) -> tuple[Tensor, Activation]:
    """x + gate · y where there is an addend, and its norm, modulated, where there is modulation."""
    tokens, width = x.shape
    y, gate = addend or (x, x)
    shift, scale = modulation or (x, x)
    strides = {part.stride(0) for pair in (addend and (gate,), modulation) for part in pair or ()}
    (stride,) = strides  # rows of all vectors are equally far from each other
    residual = torch.empty_like(x) if addend else x
    values, scales = _room(x, fp8=fp8) if modulation else (x, x)
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
        FP8=fp8,
        CLIP=x.dtype == torch.float16,
        **_shape(width),
    )
    return residual, Quantised(values, scales) if fp8 else values


def _room(x: Tensor, *, fp8: bool) -> tuple[Tensor, Tensor]:
    """Where an activation of x's shape goes, and its scales."""
    if not fp8:
        return torch.empty_like(x), x
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=FP8), scales


def _shape(width: int, per_warp: int = 1024) -> dict[str, int]:
    """A block of a program; per_warp: values of it for each warp, what was fastest on an H200."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // per_warp))}


@triton.jit
def _store_fp8(row, values, scales, token, width, columns, inside):  # type: ignore[no-untyped-def]
    """One token, quantised. row is 0 where it is not inside."""
    factor = _fp8_factor(tl.max(tl.abs(row)), scales, token)
    tl.store(values + token * width + columns, (row * factor).to(tl.float8e4nv), mask=inside)


@triton.jit
def _fp8_factor(amax, scales, token):  # type: ignore[no-untyped-def]
    """What to multiply a token's values by, so that one division does; its scale is stored."""
    amax = tl.maximum(amax, _LEAST_AMAX)
    tl.store(scales + token, amax / _FP8_MAX)
    return _FP8_MAX / amax


@triton.jit
def _quantise_kernel(  # type: ignore[no-untyped-def]
    x, places, values, scales, width, GATHER: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    source = tl.load(places + token).to(tl.int64) if GATHER else token
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(x + source * width + columns, mask=inside, other=0.0).to(tl.float32)
    _store_fp8(row, values, scales, token, width, columns, inside)


@triton.jit
def _gelu_kernel(  # type: ignore[no-untyped-def]
    x, values, scales, width, FP8: tl.constexpr, BLOCK: tl.constexpr
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
    if FP8:
        highest = tl.maximum(tl.maximum(tl.abs(row1), tl.abs(row2)), tl.abs(row3))
        factor = _fp8_factor(tl.max(highest), scales, token)
        row1, row2, row3 = row1 * factor, row2 * factor, row3 * factor
    dtype = values.dtype.element_ty
    tl.store(values + start + first, row1.to(dtype), mask=first < width)
    tl.store(values + start + second, row2.to(dtype), mask=second < width)
    tl.store(values + start + third, row3.to(dtype), mask=third < width)


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
    FP8: tl.constexpr,
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
        if FP8:
            _store_fp8(row, values, scales, token, width, columns, inside)
        else:
            tl.store(values + at, row.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _heads_kernel(  # type: ignore[no-untyped-def]
    qkv,
    norms,
    rope,
    places,
    joint,
    tokens,
    text_tokens,
    heads,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = tl.load(places + token).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = head < heads
    width = heads * SIZE
    at = head * SIZE + column
    x = tl.load(qkv + token * 3 * width + part * width + at, mask=inside, other=0.0)
    target = joint + part.to(tl.int64) * tokens * width + place * width + at
    if part < 2:
        x = x.to(tl.float32)
        stream = (token >= text_tokens).to(tl.int32)
        weight = tl.load(norms + (stream * 2 + part) * SIZE + column).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / SIZE + _EPSILON) * weight
        even, odd = tl.split(tl.reshape(x, (HEADS, SIZE // 2, 2)))
        pair = tl.arange(0, SIZE // 2)[None, :]
        cosine = tl.load(rope + token * SIZE + 2 * pair)
        sine = tl.load(rope + token * SIZE + 2 * pair + 1)
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(turned, (HEADS, SIZE)).to(joint.dtype.element_ty)
    tl.store(target, x, mask=inside)
