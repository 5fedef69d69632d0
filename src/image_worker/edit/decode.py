"""From latents to a picture."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from image_worker.edit.conditions import unpack
from image_worker.edit.denoise import Picture
from image_worker.edit.latents import statistics
from image_worker.edit.sizes import TOKEN
from image_worker.edit.tiles import through_vae
from image_worker.errors import BrokenPicture
from image_worker.model.build import Model

_PREVIEW_SIDE = 32  # latents; 256 pixels


def decode(model: Model, picture: Picture) -> Image.Image:
    """The finished picture, RGB.

    Raises:
        BrokenPicture: the VAE's numbers overflowed.
    """
    return Image.fromarray(decode_pixels(model, picture).numpy())


def decode_pixels(model: Model, picture: Picture) -> Tensor:
    """The same as (height, width, 3) uint8 on the CPU."""
    _, rows, columns = picture.shape
    latents = unpack(picture.latents, picture.shape)
    pixels = rows * columns * TOKEN**2
    return through_vae(model, pixels, lambda tile: _decode(model, latents, tile))


def preview(model: Model, picture: Picture) -> Tensor:
    """What the picture would be if it went on straight from here, small: as `decode_pixels`."""
    assert picture.velocity is not None
    answer = picture.latents - picture.levels[picture.step] * picture.velocity
    latents = unpack(answer, picture.shape)
    factor = max(1, -(-max(latents.shape[-2:]) // _PREVIEW_SIDE))
    return _decode(model, functional.avg_pool2d(latents, factor))


@torch.inference_mode()
def _decode(model: Model, latents: Tensor, tile: int | None = None) -> Tensor:
    """(1, channels, rows, columns), normalised, to pixels (8 · rows, 8 · columns, 3).

    tile: as of `Vae.decode`.
    """
    mean, deviation = statistics(model.vae, model.device, model.dtype)
    # In upstream's order of operations, so that bf16 rounds alike.
    values = model.vae.decode(latents / (1.0 / deviation) + mean, tile)[0]
    if not torch.isfinite(values).all():
        raise BrokenPicture("the VAE's numbers overflowed; BNB_COMPUTE=bf16 may help")
    shares = (values * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    pixels: Tensor = (shares * 255).round().to(torch.uint8).cpu()
    return pixels
