"""What 4-bit storage leaves of weights, for a training that is to prepare them for it.

In a share of the steps the model runs with weights rounded to NF4, and the unrounded masters take
the gradients of these (the straight-through estimator: Bengio et al., 2013). A network this narrow
does not average the rounding out, as the big one does, unless it has learned to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor, nn

from image_worker.model.components import Component
from image_worker.model.formats.nf4 import BLOCK


def nf4(weight: Tensor) -> Tensor:
    """`weight` as NF4 keeps it, but for the rounding of the scales, which changes little.

    Its values are cut into blocks as they lie; their number is a multiple of `BLOCK`.
    """
    grid = _grid(weight.device)
    blocks = weight.float().view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    nearest = torch.bucketize(blocks / scales, (grid[1:] + grid[:-1]) / 2)
    return (grid[nearest] * scales).view_as(weight).to(weight.dtype)


@cache
def _grid(device: torch.device) -> Tensor:
    """The 16 values, (16); copied to the card once, since a CUDA graph cannot."""
    values: Tensor = get_4bit_type("nf4", device=device)
    return values


def served(weight: Tensor) -> Tensor:
    """`weight` exactly as the worker's NF4 keeps it; not for a CUDA graph."""
    quantised = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found: Tensor = dequantize_4bit(*quantised)
    return found


def quantised_weights(component: Component, module: nn.Module) -> list[Tensor]:
    """Those weights of a component that are quantised when it is served."""
    return [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and component.quantised(name)
    ]


class Rounding:
    """Rounds weights in place, all or none of them, as often as `set_share` says: in [0, 1].

    To be called after a step has written them anew. Part of a CUDA graph.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._share = torch.zeros((), device=weights[0].device)

    def set_share(self, share: float) -> None:
        self._share.fill_(share)

    @torch.no_grad()
    def __call__(self) -> None:
        plain = torch.cat([weight.flatten() for weight in self._weights])
        now = torch.rand_like(self._share) < self._share
        parts = torch.where(now, nf4(plain), plain).split([w.numel() for w in self._weights])
        shaped = [part.view_as(w) for part, w in zip(parts, self._weights, strict=True)]
        torch._foreach_copy_(self._weights, shaped)
