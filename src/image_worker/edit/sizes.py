"""Picture sizes, in pixels and in tokens.

Sizes follow upstream's grids exactly: a result whose grid differs from its reference's comes out
zoomed or shifted.
"""

from __future__ import annotations

import math

TOKEN = 16  # pixels per token and side: 8 by the VAE, 2 by packing
_GRID = 32  # references are resized to multiples of this


def fit_area(area: int, ratio: float) -> tuple[int, int]:
    """(width, height) of about `area` pixels and of width / height = `ratio`, on the 32 grid.

    As diffusers' `calculate_dimensions` has it: each side is rounded by itself.
    """
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / _GRID) * _GRID, round(height / _GRID) * _GRID


def output_size(area: int, ratio: float, width: int | None, height: int | None) -> tuple[int, int]:
    """(width, height) of the result: as asked; a side that was not asked for follows the ratio."""
    if width and height:
        return width, height
    if width:
        return width, max(TOKEN, round(width / ratio / TOKEN) * TOKEN)
    if height:
        return max(TOKEN, round(height * ratio / TOKEN) * TOKEN), height
    return fit_area(area, ratio)


def shrunk(size: tuple[int, int], most_tokens: int, smallest_side: int) -> tuple[int, int] | None:
    """(width, height) in the shape of `size`, but of so many tokens at most.

    Each side is rounded down by itself. None where one would be under `smallest_side` pixels.
    """
    _, rows, columns = tokens(*size)
    scale = math.sqrt(max(0, most_tokens) / (rows * columns))
    width, height = int(columns * scale) * TOKEN, int(rows * scale) * TOKEN
    return (width, height) if min(width, height) >= smallest_side else None


def tokens(width: int, height: int) -> tuple[int, int, int]:
    """A picture's shape in tokens: (frames = 1, rows, columns)."""
    return 1, height // TOKEN, width // TOKEN
