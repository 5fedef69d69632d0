"""At full size on a card: our forward against diffusers' module. Run by `make test-gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from image_worker.model.transformer import Row, Transformer, velocities

pytestmark = pytest.mark.gpu

TARGET, REFERENCE = (1, 64, 64), (1, 64, 64)  # 1024² with one reference


@pytest.fixture(scope="module")
def transformer() -> Iterator[Any]:
    """All 20 B parameters, random, in bf16 on the card."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    rope = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    model.pos_embed = rope  # its tables are plain tensors, which to_empty leaves on meta
    yield model
    del model
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def ours(transformer: Any) -> Iterator[Transformer]:
    """The same weights, served in bf16."""
    made = Transformer(
        copy.deepcopy(transformer), torch.device("cuda"), torch.bfloat16, fp8=False
    ).eval()
    yield made
    del made
    torch.cuda.empty_cache()


def _row(target: tuple[int, int, int], text: int, timestep: float, seed: int) -> Row:
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    count = target[1] * target[2] + REFERENCE[1] * REFERENCE[2]
    return Row(noise(count, 64), (target, REFERENCE), noise(text, 3584), timestep)


@torch.inference_mode()
def _stock(model: Any, row: Row) -> torch.Tensor:
    output = model(
        hidden_states=row.image[None],
        encoder_hidden_states=row.text[None],
        timestep=torch.tensor([1000 * row.timestep], device="cuda").to(torch.bfloat16) / 1000,
        img_shapes=[list(row.shapes)],
        return_dict=False,
    )[0]
    return output[0, : row.target_tokens]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def test_one_row_equals_stock(transformer: Any, ours: Transformer) -> None:
    row = _row(TARGET, 256, 0.75, seed=1)
    assert _relative(velocities(ours, [row])[0], _stock(transformer, row)) <= 2e-2


def test_a_batch_of_different_rows_equals_each_alone(transformer: Any, ours: Transformer) -> None:
    rows = [_row(TARGET, 256, 0.75, seed=1), _row((1, 48, 80), 90, 0.3, seed=2)]
    for row, found in zip(rows, velocities(ours, rows), strict=True):
        assert torch.isfinite(found).all()
        assert _relative(found, _stock(transformer, row)) <= 3e-2
