"""Weights in FP8 widened just before each product, on cards or for inputs that need them so.

FP8's bits are taken apart here, since Triton has its numbers from compute capability 8.9 on only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.rounding import rounded

BLOCK = 2048  # values of one program, of one row


def decode(values: Tensor, scales: Tensor, into: Tensor) -> None:
    """As `reference.decode_fp8`. All are contiguous."""
    rows, columns = values.shape
    _fp8_kernel[(rows, triton.cdiv(columns, BLOCK))](
        values.view(torch.uint8), scales, into, columns, BLOCK=BLOCK, num_warps=4
    )


@triton.jit
def _fp8_kernel(values, scales, into, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    code = tl.load(values + row * columns + place, mask=inside, other=0).to(tl.int32)
    # Half precision has a fifth bit for exponents, and its bias is 15 instead of 7: with the same
    # exponent and fraction it is 2^-8 of the number, the smallest ones, too.
    bits = (code & 0x80) << 8 | (code & 0x7F) << 7
    number = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    number = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
    found = number * tl.load(scales + row)
    tl.store(into + row * columns + place, rounded(found, into.dtype.element_ty), mask=inside)
