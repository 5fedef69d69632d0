"""The autoencoder at full size against diffusers'. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from image_worker.model.configs import VaeConfig
from image_worker.model.vae import Vae, checkpoint_name, last_frame

pytestmark = pytest.mark.gpu


@torch.inference_mode()
def test_equals_stock_at_1024() -> None:
    torch.manual_seed(0)
    stock = AutoencoderKLQwenImage().cuda().eval()
    ours = Vae(VaeConfig.parse(stock.config)).cuda().eval()
    state = stock.state_dict().items()
    ours.load_state_dict({name: last_frame(t) for name, t in state if checkpoint_name(name)})
    pixels = torch.rand(1, 3, 1024, 1024, device="cuda") * 2 - 1
    latents = stock.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    found = ours.encode(pixels)
    assert (found - latents).norm() / latents.norm() <= 1e-3  # tf32 convolutions
    decoded = stock.decode(latents[:, :, None]).sample[:, :, 0]
    assert (ours.decode(latents) - decoded).norm() / decoded.norm() <= 1e-3
