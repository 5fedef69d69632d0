"""The folded autoencoder at full size against diffusers'. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from image_worker.model.vae import PictureVae

pytestmark = pytest.mark.gpu


@torch.inference_mode()
def test_equals_stock_at_1024() -> None:
    torch.manual_seed(0)
    stock = AutoencoderKLQwenImage().cuda().eval()
    ours = PictureVae().cuda().eval()
    ours.load_state_dict(stock.state_dict())
    ours.fold()
    pixels = torch.rand(1, 3, 1, 1024, 1024, device="cuda") * 2 - 1
    latents = stock.encode(pixels).latent_dist.mode()
    found = ours.encode(pixels).latent_dist.mode()
    assert (found - latents).norm() / latents.norm() <= 1e-3  # tf32 convolutions
    decoded, ours_decoded = (vae.decode(latents).sample for vae in (stock, ours))
    assert (ours_decoded - decoded).norm() / decoded.norm() <= 1e-3
