"""What both networks of the text encoder are made of: norms, MLPs, rotary embeddings.

Modules round where upstream's do (float32 inside norms, the input's type outside), so that bf16
results are upstream's. They hold no buffers: what no checkpoint has is computed when it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Rope = tuple[Tensor, Tensor]  # cosines and sines of tokens' angles, (tokens, 1, head)


class Linear(nn.Linear):
    """torch's, without values to begin with: a checkpoint has them."""

    def reset_parameters(self) -> None:
        """Nothing to do."""


class Embedding(nn.Embedding):
    """torch's, without values to begin with.

    On the meta device, torch would import sympy to draw some, which takes seconds.
    """

    def reset_parameters(self) -> None:
        """Nothing to do."""


class RmsNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) in and out."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)
        return self.weight * wide.to(x.dtype)


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) in and out."""
        found: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


def frequencies(count: int, theta: float) -> Tensor:
    """Angles per position, (count), float32, on the CPU: the powers of 1/theta from 0 up to 1."""
    return 1.0 / theta ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count))


def rope(angles: Tensor, device: torch.device, dtype: torch.dtype) -> Rope:
    """Of angles (tokens, head / 2), in radians: one for each pair of a head's numbers."""
    angles = angles.to(device)
    both = torch.cat([angles, angles], dim=-1)[:, None]
    return both.cos().to(dtype), both.sin().to(dtype)


def turn(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding (Su et al., 2021) of x (tokens, heads, head).

    A pair is a number of a head's first half and the one at its place in the second.
    """
    cosines, sines = rope
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
