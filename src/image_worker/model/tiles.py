"""Pictures in tiles that fade into each other: for what does not fit the card as a whole.

They overlap by a quarter of their side, and are put together as in diffusers' `tiled_decode`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, side: int, made: int) -> Tensor:
    """What `run` makes of x (B, channels, H, W), tile by tile: (B, ..., H · made / side, ...).

    side: of a tile, a multiple of 4; at the right and lower edge they are smaller. made: of what
    `run` makes of it, a multiple of 4.
    """
    stride, kept = side * 3 // 4, made * 3 // 4
    above: list[Tensor] = []
    strips: list[Tensor] = []
    for top in range(0, x.shape[-2], stride):
        row: list[Tensor] = []
        for number, left in enumerate(range(0, x.shape[-1], stride)):
            tile = run(x[..., top : top + side, left : left + side])
            if above:
                _fade(above[number], tile, made - kept, dim=-2)
            if row:
                _fade(row[-1], tile, made - kept, dim=-1)
            row.append(tile)
        strips.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        above = row
    return torch.cat(strips, dim=-2)


def _fade(before: Tensor, after: Tensor, overlap: int, dim: int) -> None:
    """From the end of `before` to the beginning of `after` along `dim` (-2 or -1), in the latter.

    Where `after` is smaller than the overlap, `before` ends with it, at the picture's edge.
    """
    overlap = min(overlap, after.shape[dim])
    share = torch.arange(overlap, device=after.device, dtype=torch.float32) / overlap
    if dim == -2:
        share = share[:, None]
    end = before.narrow(dim, before.shape[dim] - overlap, overlap)
    start = after.narrow(dim, 0, overlap)
    start.copy_(end * (1 - share) + start * share)
