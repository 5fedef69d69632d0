"""Rows to try a transformer on, and how near what it makes of them must be."""

from __future__ import annotations

import torch

from image_worker.compute import Compute
from image_worker.model.transformer import Row

EXACT = 1e-4  # relative; float32, in another order
# The miniature is deeper in noise than the full model: what it makes of 1% is 3 to 5%.
TOLERANCE: dict[Compute, float] = {"int8": 0.06, "fp8": 0.16}


def row(side: int, references: int, text: int, seed: int) -> Row:
    """Noise for the miniature: a picture of side² tokens, references of 64, and a prompt."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, side, side), *((1, 8, 8),) * references)
    tokens = sum(height * width for _, height, width in shapes)
    image = torch.randn(tokens, 64, generator=generator)
    return Row(image, shapes, torch.randn(text, 128, generator=generator), 0.75)


ROWS = [row(8, 1, 21, 1), row(6, 2, 5, 2)]
