"""What the fused operations compute, in plain torch: their definition, and the way on a CPU.

Tokens of all rows lie one after the other, those of the prompts first, those of the pictures behind
them ("stream order"). For attention each row's prompt and pictures stand together ("joint order").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-6  # of every norm in this architecture
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
LEAST_AMAX = 1e-12  # so that a token of zeros has a scale
FP16_MAX = 65504.0
_SCALES_ALIGNMENT = 16  # bytes; cuBLAS refuses others


@dataclass(frozen=True)
class Quantised:
    """values (N, W) in float8_e4m3fn, and what to multiply each token by: scales (N, 1) float32."""

    values: Tensor
    scales: Tensor

    def __getitem__(self, tokens: slice) -> Quantised:
        scales = self.scales[tokens]
        if scales.data_ptr() % _SCALES_ALIGNMENT:
            scales = scales.clone()
        return Quantised(self.values[tokens], scales)


Activation = Tensor | Quantised


def quantise(x: Tensor) -> Quantised:
    """Each token (N, W) by a scale of its own, so that its largest value is FP8's largest."""
    wide = x.float()
    scales = wide.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_AMAX) / FP8_MAX
    return Quantised((wide / scales).to(FP8), scales)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor, *, fp8: bool) -> Activation:
    """LayerNorm without weights, times (1 + scale), plus shift.

    x (N, W); shift, scale (M, W), of which token n takes number owner[n].
    """
    normal = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
    result = normal * (1 + scale[owner]) + shift[owner]
    return quantise(result) if fp8 else result


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
    fp8: bool,
) -> tuple[Tensor, Activation]:
    """`add`, where there is something to add, and `modulate` of its result."""
    if y is not None and gate is not None:
        x = add(x, y, gate, owner)
    return x, modulate(x, shift, scale, owner, fp8=fp8)


def gelu(x: Tensor, *, fp8: bool) -> Activation:
    """GELU by its tanh formula."""
    result = functional.gelu(x, approximate="tanh")
    return quantise(result) if fp8 else result


def to_joint_heads(
    qkv: Tensor, norms: Tensor, rope: Tensor, places: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised by RMS and rotated, and values: each (N, heads, D), joint order.

    qkv (N, 3 · heads · D), stream order; norms (2, 2, D): of prompts and pictures, of queries and
    keys; rope complex64 (N, D / 2), joint order; places (N): where in joint order a token stands.
    """
    parts = qkv.view(len(qkv), 3, -1, norms.shape[-1])
    queries, keys = (
        torch.cat(
            [
                _rms_norm(parts[:text_tokens, part], norms[0, part]),
                _rms_norm(parts[text_tokens:, part], norms[1, part]),
            ]
        )
        for part in (0, 1)
    )
    stream = torch.empty_like(places)
    stream[places] = torch.arange(len(places), device=places.device)
    return _rotate(queries[stream], rope), _rotate(keys[stream], rope), parts[stream, 2]


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + EPSILON)).to(weight.dtype) * weight


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates adjacent pairs, in float32. x (N, heads, D), rope complex (N, D / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope[:, None]).flatten(2).type_as(x)


def to_stream(mixed: Tensor, places: Tensor, *, fp8: bool) -> Activation:
    """Attention's output (N, W), joint order, in stream order."""
    result = mixed[places]
    return quantise(result) if fp8 else result
