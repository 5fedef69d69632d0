"""From latents to a picture."""

from __future__ import annotations

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from image_worker.edit.conditions import unpack
from image_worker.edit.denoise import Picture
from image_worker.edit.sizes import TOKEN
from image_worker.errors import BrokenPicture
from image_worker.model.build import Model
from image_worker.model.placement import TILED_DECODE_SIDE
from image_worker.model.vae import statistics


@torch.inference_mode()
def decode(model: Model, picture: Picture) -> Image.Image:
    """The finished picture, RGB.

    Raises:
        BrokenPicture: the VAE's numbers overflowed.
    """
    model.placement.bring("vae")
    mean, deviation = statistics(model.vae, model.device, model.dtype)
    # In upstream's order of operations, so that bf16 rounds alike.
    latents = unpack(picture.latents, picture.shape) / (1.0 / deviation) + mean
    _set_tiling(model, picture)
    pixels = model.vae.decode(latents, return_dict=False)[0][:, :, 0]
    if not torch.isfinite(pixels).all():
        raise BrokenPicture("the VAE's numbers overflowed; BNB_COMPUTE=bf16 may help")
    images = VaeImageProcessor(vae_scale_factor=TOKEN).postprocess(pixels, output_type="pil")
    return images[0]  # type: ignore[no-any-return]


def _set_tiling(model: Model, picture: Picture) -> None:
    _, rows, columns = picture.shape
    limit = model.plan.max_pixels
    if limit is None or rows * columns * TOKEN**2 <= limit:
        model.vae.disable_tiling()
    else:
        model.vae.enable_tiling(
            tile_sample_min_height=TILED_DECODE_SIDE,
            tile_sample_min_width=TILED_DECODE_SIDE,
            tile_sample_stride_height=TILED_DECODE_SIDE * 3 // 4,
            tile_sample_stride_width=TILED_DECODE_SIDE * 3 // 4,
        )
