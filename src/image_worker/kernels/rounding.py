"""Rounding to FP8 and int8, within kernels: parts of what others compute."""

from __future__ import annotations

import triton
import triton.language as tl

from image_worker.kernels import reference

LEAST_AMAX = tl.constexpr(reference.LEAST_AMAX)
FP8_MAX = tl.constexpr(reference.FP8_MAX)
INT8_MAX = tl.constexpr(reference.INT8_MAX)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: added and taken away, it rounds to an integer


@triton.jit
def store_rounded(row, values, scales, token, width, columns, inside):  # type: ignore[no-untyped-def]
    """One token, rounded to the type of `values`. row is 0 where it is not inside."""
    dtype = values.dtype.element_ty
    factor = factor_of_token(tl.max(tl.abs(row)), row, scales, token, dtype)
    tl.store(values + token * width + columns, rounded(row * factor, dtype), mask=inside)


@triton.jit
def factor_of_token(amax, row, scales, token, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What to multiply a token's values by, so that one division does; its scale is stored.

    row: the token's values, or sums of them.
    """
    amax = tl.maximum(amax, LEAST_AMAX)
    if tl.int8 == DTYPE:
        # A maximum passes over NaN, and int8 has none: the scale carries it on.
        tl.store(scales + token, amax / INT8_MAX + 0 * tl.sum(row))
        return INT8_MAX / amax
    tl.store(scales + token, amax / FP8_MAX)
    return FP8_MAX / amax


@triton.jit
def rounded(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.int8 == DTYPE:
        return to_int8(x)
    return x.to(DTYPE)


@triton.jit
def to_int8(x):  # type: ignore[no-untyped-def]
    """float32 in -127 to 127, to the nearest, of two to the even one."""
    return ((x + _ROUND) - _ROUND).to(tl.int8)
