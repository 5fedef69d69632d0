"""Timesteps, positions and the prompt's norm equal diffusers' to the bit."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedRope,
    QwenTimestepProjEmbeddings,
)

from image_worker.kernels import reference
from image_worker.model.embeddings import Shape, embed_timestep, rope, sinusoids

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_timesteps(dtype: torch.dtype) -> None:
    stock = QwenTimestepProjEmbeddings(48).to(dtype)
    levels = torch.tensor([1.0, 0.7568, 0.25, 0.0039, 0.0]).to(dtype)
    expected = stock(levels, torch.empty(0, dtype=dtype))
    assert torch.equal(sinusoids(levels), stock.time_proj(levels))
    assert torch.equal(embed_timestep(stock.timestep_embedder, levels), expected)
    assert expected.dtype == dtype and expected.std() > 0.01


@pytest.mark.parametrize("axes", [(16, 56, 56), (8, 12, 12), (2, 4, 6)])
@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 64, 64)],
        [(1, 5, 8), (1, 3, 11)],  # odd sides lie further to the left and above
        [(1, 1, 1), (1, 7, 2), (1, 2, 9)],
        [(2, 4, 6)],
    ],
)
def test_positions(shapes: list[Shape], axes: tuple[int, int, int]) -> None:
    stock = QwenEmbedRope(theta=10000, axes_dim=list(axes), scale_rope=True)
    expected = stock([shapes], max_txt_seq_len=19)
    for found, wanted in zip(rope(shapes, 19, axes), expected, strict=True):
        assert found.dtype == torch.complex64
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@torch.no_grad()
def test_the_prompts_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = RMSNorm(48, eps=1e-6)
    stock.weight.uniform_(0.5, 1.5)
    stock = stock.to(dtype)
    x = torch.randn(7, 48).to(dtype) * torch.tensor([1e-4, 1e-2, 1, 1, 10, 100, 0])[:, None]
    x = x.to(dtype)
    found = reference.rms_norm(x, stock.weight)
    assert found.dtype == dtype and torch.equal(found, stock(x))
