"""The autoencoder with time folded away equals diffusers', with and without tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from image_worker.model.vae import PictureVae

# With the published model's temporal layers, which the miniature leaves out.
CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKLQwenImage, PictureVae]:
    torch.manual_seed(0)
    stock, ours = AutoencoderKLQwenImage(**CONFIG).eval(), PictureVae(**CONFIG).eval()
    ours.load_state_dict(stock.state_dict())
    ours.fold()
    return stock, ours


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (64, 160)])
def test_equals_stock(pair: Any, size: tuple[int, int]) -> None:
    stock, ours = pair
    pixels = torch.rand(1, 3, 1, *size) * 2 - 1
    expected = stock.encode(pixels).latent_dist.mode()
    assert torch.allclose(ours.encode(pixels).latent_dist.mode(), expected, atol=1e-5)
    decoded = stock.decode(expected).sample
    assert torch.allclose(ours.decode(expected).sample, decoded, atol=1e-5)
    assert decoded.std() > 0.01


@torch.no_grad()
def test_tiles_equal_stocks_tiles(pair: Any) -> None:
    _, ours = pair
    latents = torch.randn(1, 16, 1, 24, 24)
    for vae in pair:
        vae.enable_tiling(96, 96, 64, 64)
    expected, found = (vae.decode(latents).sample for vae in pair)
    for vae in pair:
        vae.disable_tiling()
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - ours.decode(latents).sample).abs().max() > 1e-4, "tiles were not used"


def test_weights_that_meet_only_zeros_are_gone(pair: Any) -> None:
    stock, ours = (sum(p.numel() for p in vae.parameters()) for vae in pair)
    assert ours < 0.45 * stock
