"""What the fused operations compute, in plain torch: their definition, and the way on a CPU.

Tokens of all rows lie one after the other, those of the prompts first, those of the pictures behind
them ("stream order"). For attention each row's prompt and pictures stand together ("joint order").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from image_worker.kernels import gguf_blocks

if TYPE_CHECKING:
    from image_worker.model.formats.gguf import GgufWeight
    from image_worker.model.formats.nf4 import Nf4Weight
    from image_worker.model.formats.svdq import SvdqWeight

EPSILON = 1e-6  # of every norm in this architecture
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
LEAST_AMAX = 1e-12  # so that a token of zeros has a scale
FP16_MAX = 65504.0
INT8_MAX = 127.0
LARGEST = {FP8: FP8_MAX, torch.int8: INT8_MAX}  # of the types that values are rounded to
_SCALES_ALIGNMENT = 16  # bytes; cuBLAS refuses others
_LEAST_ROWS = 17  # that torch multiplies in int8 on a card
# Tokens, or rows of weights, at a time: Turing cards run these definitions, and their plan has no
# room for all of it in 32 bits.
_PIECE = 1024
_PIECE_OF_BLOCKS = 1 << 20  # values at a time, of GGUF's: a CPU's cache has room for these


@dataclass(frozen=True)
class Quantised:
    """values (N, W) in FP8 or int8, and what to multiply each token by: scales (N, 1) float32.

    dtype: the type that was rounded. Of a token with NaN the values or the scale are NaN.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __getitem__(self, tokens: slice) -> Quantised:
        scales = self.scales[tokens]
        if scales.data_ptr() % _SCALES_ALIGNMENT:
            scales = scales.clone()
        return Quantised(self.values[tokens], scales, self.dtype)


Activation = Tensor | Quantised


def quantise(x: Tensor, round_to: torch.dtype) -> Quantised:
    """Each token (N, W) by a scale of its own, so that its largest value is the type's largest."""
    wide = x.float()
    scales = wide.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_AMAX) / LARGEST[round_to]
    return Quantised(round_values(wide / scales, round_to), scales, x.dtype)


def round_values(x: Tensor, round_to: torch.dtype) -> Tensor:
    """x in the type `round_to`: the nearest, of two the even one."""
    return (x.round() if round_to == torch.int8 else x).to(round_to)


def _rounded_if(x: Tensor, round_to: torch.dtype | None) -> Activation:
    return x if round_to is None else quantise(x, round_to)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor, *, round_to: torch.dtype | None
) -> Activation:
    """LayerNorm without weights, times (1 + scale), plus shift.

    x (N, W); shift, scale (M, W), of which token n takes number owner[n]; round_to: FP8, int8, or
    None for x's own type.
    """
    normal = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    result = normal * (1 + scale[owner]) + shift[owner]
    return _rounded_if(result, round_to)


def add(x: Tensor, y: Tensor, gate: Tensor, owner: Tensor) -> Tensor:
    """x + gate · y: the residual. gate (M, W), as in `modulate`."""
    result = x + gate[owner] * y
    if result.dtype == torch.float16:  # this model's residuals overflow half precision
        result = result.clip(-FP16_MAX, FP16_MAX)
    return result


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
    """`add`, where there is something to add, and `modulate` of its result."""
    if y is not None and gate is not None:
        x = add(x, y, gate, owner)
    return x, modulate(x, shift, scale, owner, round_to=round_to)


def gelu(x: Tensor, *, round_to: torch.dtype | None) -> Activation:
    """GELU by its tanh formula."""
    result = functional.gelu(x, approximate="tanh")
    return _rounded_if(result, round_to)


def to_joint_heads(
    qkv: Tensor, norms: Tensor, rope: Tensor, places: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised by RMS and rotated, and values: each (N, heads, D), joint order.

    qkv (N, 3 · heads · D), stream order; norms (2, 2, D): of prompts and pictures, of queries and
    keys; rope complex64 (N, D / 2), stream order; places (N): where in joint order a token stands.
    """
    parts = qkv.view(len(qkv), 3, -1, norms.shape[-1])
    queries, keys = (
        torch.cat(
            [
                rms_norm(parts[:text_tokens, part], norms[0, part]),
                rms_norm(parts[text_tokens:, part], norms[1, part]),
            ]
        )
        for part in (0, 1)
    )
    stream = torch.empty_like(places)
    stream[places] = torch.arange(len(places), device=places.device)
    return _rotate(queries, rope)[stream], _rotate(keys, rope)[stream], parts[stream, 2]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm (arXiv:1910.07467): x (..., W) over the root of its mean square, times weight (W)."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPSILON)).to(weight.dtype) * weight


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates adjacent pairs, in float32. x (N, heads, D), rope complex (N, D / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope[:, None]).flatten(2).type_as(x)


def to_stream(mixed: Tensor, places: Tensor, *, round_to: torch.dtype | None) -> Activation:
    """Attention's output (N, W), joint order, in stream order."""
    return _rounded_if(mixed[places], round_to)


def multiply(
    x: Quantised, text_tokens: int, weight: Tensor, scales: Tensor, bias: Tensor
) -> Tensor:
    """(N, out) = x · weightᵀ + bias, of x (N, in) in stream order: each stream by its own weights.

    weight (2 · out, in), in the type of x's values: the pictures', then the prompts'; scales (2 ·
    out, 1) float32: what to multiply each of its rows by; bias (2 · out). The result has the type
    that x had.
    """
    into = x.values.new_empty(len(x.values), len(weight) // 2, dtype=x.dtype)
    for tokens, rows in streams(text_tokens, weight):
        _multiply(x[tokens], weight[rows], scales[rows], bias[rows], into[tokens])
    return into


def streams(text_tokens: int, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of each stream that has tokens, which they are, and which rows of `weight` are for them."""
    half = len(weight) // 2
    if text_tokens:
        yield slice(text_tokens), slice(half, None)
    yield slice(text_tokens, None), slice(half)


def _multiply(x: Quantised, weight: Tensor, scales: Tensor, bias: Tensor, into: Tensor) -> None:
    for first in range(0, len(into), _PIECE):
        tokens = slice(first, first + _PIECE)
        if weight.dtype == torch.int8:
            sums = _sums_of_integers(x.values[tokens], weight)
        else:
            sums = x.values[tokens].float() @ weight.float().t()
        sums = sums * x.scales[tokens]
        sums *= scales.t()
        sums += bias
        into[tokens].copy_(sums)


def _sums_of_integers(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, exact."""
    if not x.is_cuda:  # whose products of integers are slower than these
        return x.double() @ weight.double().t()
    padded = functional.pad(x, (0, 0, 0, max(0, _LEAST_ROWS - len(x))))
    return torch._int_mm(padded, weight.t())[: len(x)]


def nf4_scales(weight: Nf4Weight) -> Tensor:
    """Of each block of 64 weights, (rows, columns / 64) float32."""
    levels = weight.levels[weight.scales.int()].view(len(weight.offsets), -1)
    outer = weight.scales_of_scales.repeat_interleave(256, dim=1)[:, : levels.shape[1]]
    return (levels * outer + weight.offsets[:, None]).view(weight.scales.shape)


def decode_nf4(weight: Nf4Weight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """The weights into (rows, columns), rounded to its type from float32.

    row_scales (rows, 1) float32, for FP8 and int8: what rows are divided by before they are
    rounded, and are to be multiplied by when they are used.
    """
    scales = nf4_scales(weight)
    if row_scales is not None:
        scales = scales / row_scales
    # The two values that each byte stands for. Looked up as one number of 64 bits, not as a row of
    # two, since a CPU takes half as long for that.
    grid = weight.grid.expand(16, 16)
    pairs = torch.stack([grid.t(), grid], dim=2).view(torch.int64).flatten()
    for first in range(0, len(into), _PIECE):
        piece = slice(first, first + _PIECE)
        codes = weight.codes[piece].int().flatten()
        values = pairs.index_select(0, codes).view(torch.float32).view(-1, 64)
        values *= scales[piece].view(-1, 1)
        into[piece] = round_values(values, into.dtype).view(-1, into.shape[1])


def decode_fp8(values: Tensor, scales: Tensor, into: Tensor) -> None:
    """FP8 values (rows, columns) times scales (rows, 1) float32, rounded once, into the same shape
    in any type that holds FP8's numbers."""
    into.copy_(values).mul_(scales)


def decode_gguf(weight: GgufWeight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """As `decode_nf4`, of what ggml's types hold."""
    rows = max(1, _PIECE_OF_BLOCKS // into.shape[1])
    for first in range(0, len(into), rows):
        piece = slice(first, first + rows)
        blocks = weight.data[piece].view(-1, weight.block[1])
        values = gguf_blocks.values(blocks, weight.tensor_type).view(-1, into.shape[1])
        if row_scales is not None:
            values = values / row_scales[piece]
        into[piece] = round_values(values, into.dtype)


def decode_svdq(weight: SvdqWeight, into: Tensor, row_scales: Tensor | None = None) -> None:
    """The weights into (rows, columns), as `decode_nf4`."""
    for rows, piece in weight.pieces():
        if row_scales is not None:
            piece /= row_scales[rows]
        into[rows] = round_values(piece, into.dtype)
