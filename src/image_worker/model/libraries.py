"""The card's libraries, made ready while weights are read.

cuDNN, which plans every convolution, cuBLAS, torch's attention and Triton each take tenths of a
second at their first use, most of it without Python's lock. A start has that time: it waits for the
disk.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.nn import functional

from image_worker.kernels import operations
from image_worker.model.configs import VAE_SCALE
from image_worker.model.placement import TILE_SIDE, Plan
from image_worker.model.recipe import Recipe, keep_kernels


@contextmanager
def loading(recipe: Recipe, decided: Plan, vae: Any) -> Iterator[None]:
    """Loads them on a thread, and waits for it at the end. Without a card there are none."""
    if recipe.device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=_load, args=[recipe, decided, vae], name="libraries")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _load(recipe: Recipe, decided: Plan, vae: Any) -> None:
    keep_kernels(recipe.settings)  # before the first of them is compiled
    whole = decided.max_pixels is None or recipe.entry.area <= decided.max_pixels
    side = math.isqrt(recipe.entry.area) if whole else TILE_SIDE
    with suppress(torch.OutOfMemoryError):  # the first edit, which needs more, meets it again
        use_each(recipe.device, recipe.dtype)
        use_vae(vae, side, recipe.device, recipe.dtype)


@torch.inference_mode()
def use_each(device: torch.device, dtype: torch.dtype) -> None:
    """Each of them once, on next to nothing."""
    tokens = torch.zeros(1, 2, 64, 128, dtype=dtype, device=device)
    functional.scaled_dot_product_attention(tokens, tokens, tokens)
    functional.linear(tokens[0, 0], tokens[0, 1])
    operations(device).quantise(tokens[0, 0], torch.int8)


@torch.inference_mode()
def use_vae(vae: Any, side: int, device: torch.device, dtype: torch.dtype) -> None:
    """Both ways at the size of most jobs' pictures: plans are made for each size anew."""
    side -= side % VAE_SCALE
    vae.decode(vae.encode(torch.zeros(1, 3, side, side, dtype=dtype, device=device)))
