"""Products of activations and weights in FP8 or int8, of both streams at once, for Hopper.

As many programs as the card has multiprocessors make tiles of the result, one after the other.
Prompts and pictures have weights of their own, and tiles of their own. In one launch their tiles
fill waves of programs together, where cuBLAS, called for each, leaves most of the card idle for the
few tokens of a prompt. While a tile is written, the next one's operands are on their way.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from image_worker.kernels.reference import Quantised

_TOKENS, _ROWS, _COLUMNS = 128, 256, 128  # of a tile, and of a step towards it
_PART = _ROWS // 2  # rows of a tile that are written at once
# Tiles of tokens whose programs run together, so that weights are still in the card's cache: of 4,
# 8, 16 and 33 the most is best for products with many rows, by 2%, and costs the others less.
_GROUP = 33


def multiply(
    x: Quantised, text_tokens: int, weight: Tensor, scales: Tensor, bias: Tensor
) -> Tensor:
    """As `reference.multiply`. A token's bytes are a multiple of 16, in what is read and made."""
    (tokens, columns), rows = x.values.shape, len(weight) // 2
    # A tile may reach beyond a tensor's end, not before its first token, when it is written.
    before = max(0, _TOKENS - text_tokens) if text_tokens else 0
    into = weight.new_empty(before + tokens, rows, dtype=x.dtype)
    tiles = triton.cdiv(text_tokens, _TOKENS) + triton.cdiv(tokens - text_tokens, _TOKENS)
    group = triton.cdiv(tiles, triton.cdiv(tiles, _GROUP))
    programs = _programs(weight.device)
    _products_kernel[(programs,)](
        TensorDescriptor.from_tensor(x.values, [_TOKENS, _COLUMNS]),
        x.scales,
        TensorDescriptor.from_tensor(weight, [_ROWS, _COLUMNS]),
        scales,
        bias,
        TensorDescriptor.from_tensor(into, [_TOKENS, _PART]),
        before,
        text_tokens,
        tokens,
        rows,
        columns,
        tiles,
        group,
        programs,
        INT8=weight.dtype == torch.int8,
        DTYPE=_TYPES[into.dtype],
        **SIZES,
        **LAUNCH,
    )
    return into[before:]


SIZES = {"TOKENS": _TOKENS, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
LAUNCH = {"num_warps": 8, "num_stages": 3}
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # Triton's interpreter runs them one after the other
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["before", "text_tokens", "tokens", "tiles", "group", "programs"])
def _products_kernel(  # type: ignore[no-untyped-def]
    x,
    x_scales,
    weight,
    scales,
    bias,
    into,
    before,
    text_tokens,
    tokens,
    rows,
    columns,
    tiles,
    group,
    programs,
    INT8: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    text_tiles = tl.cdiv(text_tokens, TOKENS)
    in_group = group * tl.cdiv(rows, ROWS)
    # Flattened, so that a tile's operands are fetched while the one before it is written. Such a
    # loop must not branch; it need not, since copies leave out what is beyond a tensor's edge.
    for number in tl.range(tl.program_id(0), tiles * tl.cdiv(rows, ROWS), programs, flatten=True):
        first = number // in_group * group
        height = tl.minimum(tiles - first, group)
        tile = first + number % in_group % height
        row = number % in_group // height * ROWS
        # The last tile of prompts ends where pictures begin: some tokens, which it shares with the
        # tile before it, come out twice, the same; or it begins before the first.
        of_text = tile < text_tiles
        in_text = tl.minimum(tile * TOKENS, text_tokens - TOKENS)
        token = tl.where(of_text, in_text, text_tokens + (tile - text_tiles) * TOKENS)
        start = tl.where(of_text, rows, 0)  # of the stream's weights
        sums = tl.zeros((TOKENS, ROWS), dtype=tl.int32 if INT8 else tl.float32)
        for column in range(0, columns, COLUMNS):
            left, right = x.load([token, column]), weight.load([start + row, column])
            sums = tl.dot(left, right.T, sums, out_dtype=sums.dtype)
        place = token + tl.arange(0, TOKENS)
        factors = tl.load(x_scales + place, mask=(place >= 0) & (place < tokens), other=0.0)
        halves = sums.reshape(TOKENS, 2, ROWS // 2).permute(0, 2, 1)
        lower, upper = tl.split(halves)
        lower = _scaled(lower, factors, scales, bias, start, row, rows, ROWS // 2)
        into.store([before + token, row], lower.to(DTYPE))
        upper = _scaled(upper, factors, scales, bias, start, row + ROWS // 2, rows, ROWS // 2)
        into.store([before + token, row + ROWS // 2], upper.to(DTYPE))


@triton.jit
def _scaled(sums, factors, scales, bias, start, row, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row += tl.arange(0, ROWS)
    inside = row < rows
    found = sums.to(tl.float32) * factors[:, None]
    found *= tl.load(scales + start + row, mask=inside, other=0.0)[None, :]
    return found + tl.load(bias + start + row, mask=inside, other=0.0).to(tl.float32)[None, :]
