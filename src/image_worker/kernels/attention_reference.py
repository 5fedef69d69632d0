"""What attention in int8 and FP8 computes, in plain torch: its definition, and the way on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from image_worker.kernels.reference import FP8, FP8_MAX, INT8_MAX, LEAST_AMAX

TILE = 128  # tokens of keys and values that share a scale
TASK = 192  # queries that the kernel of this attention takes at a time
# What a tile's largest value counts as, at least, when its scale is chosen. Weights are rounded
# with that scale in them, so a tile of zeros would lose its share in the softmax's sum. FP8 keeps
# the bits of smaller values all the same.
LEAST_VALUE = 2.0**-4
_HEADROOM = 256  # the softmax's largest weight, in FP8: small ones keep more of their bits


def attend_int8(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax attention within each row: (N, heads, D) each to (N, heads · D), joint order.

    Queries in int8 with a scale for each token and head, keys in int8 and values in FP8 with one
    for each 128 tokens and head; the softmax's weights in FP8. Sums are exact.
    """
    parts = (part.transpose(0, 1) for part in (q, k, v))
    rows = zip(*(torch.split(part, list(lengths), dim=1) for part in parts), strict=True)
    return torch.cat([_attend_int8(*row) for row in rows]).type_as(q)


def _attend_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one row: (heads, L, D) each to (L, heads · D) float32."""
    q, k, v = q.float(), k.float(), v.float()
    q = _rounded(q, q.abs().amax(dim=-1, keepdim=True))
    k = _rounded(k, _largest_of_tiles(k))
    value_scales = _largest_of_tiles(v).clamp(min=LEAST_VALUE) / FP8_MAX
    v = (v / value_scales).to(FP8).float()
    logits = q @ k.mT / q.shape[-1] ** 0.5
    # A tile's values have a scale: weights are rounded with it in them, as they are multiplied.
    weights = (logits + value_scales.log().mT).softmax(dim=-1)
    weights = weights / weights.amax(dim=-1, keepdim=True) * _HEADROOM
    weights = weights.to(FP8).float()
    total = (weights / value_scales.mT).sum(dim=-1, keepdim=True)
    mixed: Tensor = weights @ v / total
    return mixed.transpose(0, 1).flatten(1)


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    """As int8 has it."""
    scales = largest.clamp(min=LEAST_AMAX) / INT8_MAX
    return (x / scales).round() * scales


def _largest_of_tiles(x: Tensor) -> Tensor:
    """The largest absolute value of each token's tile, (heads, L, 1), of x (heads, L, D)."""
    tiles = [tile.abs().amax(dim=(1, 2), keepdim=True) for tile in torch.split(x, TILE, dim=1)]
    sizes = [min(TILE, x.shape[1] - start) for start in range(0, x.shape[1], TILE)]
    parts = [tile.expand(-1, size, -1) for tile, size in zip(tiles, sizes, strict=True)]
    return torch.cat(parts, dim=1).clamp(min=LEAST_AMAX)
