"""From latents to a picture."""

from __future__ import annotations

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from image_worker.edit.conditions import tiles_where_needed, unpack
from image_worker.edit.denoise import Picture
from image_worker.edit.sizes import TOKEN
from image_worker.errors import BrokenPicture
from image_worker.model.build import Model
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
    _, rows, columns = picture.shape
    with tiles_where_needed(model, rows * columns * TOKEN**2):
        pixels = model.vae.decode(latents, return_dict=False)[0][:, :, 0]
    if not torch.isfinite(pixels).all():
        raise BrokenPicture("the VAE's numbers overflowed; BNB_COMPUTE=bf16 may help")
    images = VaeImageProcessor(vae_scale_factor=TOKEN).postprocess(pixels, output_type="pil")
    return images[0]  # type: ignore[no-any-return]
