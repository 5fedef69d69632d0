"""Products of activations and weights in int8, for cards before and after Hopper.

A program makes one tile of the result: it multiplies tiles of both operands along the columns, and
turns the sums, in int32, into the result's type.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.reference import Quantised

_GROUP = 8  # tiles of tokens whose programs run together, so that they share weights in the cache


def multiply(x: Quantised, weight: Tensor, scales: Tensor, bias: Tensor, into: Tensor) -> None:
    """Into (N, out): x · weightᵀ + bias. weight (out, in) int8, bias (out)."""
    (tokens, columns), rows = x.values.shape, len(weight)
    tiles = tile_sizes(capability(weight.device))
    programs = triton.cdiv(tokens, tiles["TOKENS"]) * triton.cdiv(rows, tiles["ROWS"])
    _multiply_kernel[(programs,)](
        x.values,
        x.scales,
        weight,
        scales,
        bias,
        into,
        tokens,
        rows,
        columns,
        into.stride(0),
        WHOLE=columns % tiles["COLUMNS"] == 0,
        GROUP=_GROUP,
        **tiles,
    )


def tile_sizes(capability: tuple[int, int]) -> dict[str, int]:
    """Of a program's tiles, and how it runs, on a card of this compute capability.

    Each thread has 128 sums. The stages of both operands fit into the shared memory that a program
    can have: 163 KiB (8.0), 227 KiB (9.0, 10.x), elsewhere 99 KiB.
    """
    if capability[0] in (9, 10):
        columns, stages, unroll = 128, 4, 1
    elif capability[0] == 8:
        # Of a loop with one product Triton carries the next one's operands, and these cards'
        # compiler keeps them byte by byte, a register each. It does not where there are two.
        columns, stages, unroll = 64, 4 if capability == (8, 0) else 3, 2
    else:
        columns, stages, unroll = 64, 4, 1
    return {
        "TOKENS": 128,
        "ROWS": 256,
        "COLUMNS": columns,
        "UNROLL": unroll,
        "num_warps": 8,
        "num_stages": stages,
    }


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The card's compute capability; any for Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@triton.jit(do_not_specialize=["tokens"])
def _multiply_kernel(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    weight,
    scales,
    bias,
    into,
    tokens,
    rows,
    columns,
    stride,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(rows, ROWS)
    first = program // in_group * GROUP
    height = tl.minimum(tl.cdiv(tokens, TOKENS) - first, GROUP)
    token = (first + program % in_group % height) * TOKENS + tl.arange(0, TOKENS)
    row = program % in_group // height * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    # Beyond the last token and row these are read again; what comes of it is not stored.
    x += tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * columns + column[None, :]
    weight += tl.minimum(row, rows - 1).to(tl.int64)[None, :] * columns + column[:, None]
    sums = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for start in tl.range(0, columns, COLUMNS, loop_unroll_factor=UNROLL):
        if WHOLE:
            left = tl.load(x)
            right = tl.load(weight)
        else:
            left = tl.load(x, mask=column[None, :] < columns - start, other=0)
            right = tl.load(weight, mask=column[:, None] < columns - start, other=0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        x += COLUMNS
        weight += COLUMNS
    found = sums.to(tl.float32) * tl.load(x_scales + token, mask=token < tokens)[:, None]
    found *= tl.load(scales + row, mask=row < rows)[None, :]
    found += tl.load(bias + row, mask=row < rows).to(tl.float32)[None, :]
    into += token.to(tl.int64)[:, None] * stride + row[None, :]
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(into, found.to(into.dtype.element_ty), mask=inside)
