"""The schedule equals diffusers' to the bit, and Lightning's equals its published levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

from image_worker.catalog import LIGHTNING_SAMPLER, Sampler
from image_worker.edit.denoise import euler_step
from image_worker.edit.schedule import sigmas
from image_worker.errors import InvalidRequest
from tests import upstream
from tests.conftest import MINI_FOLDER

BASE = Sampler(0.5, 0.9, 256, 8192, 0.02)


@pytest.mark.parametrize("tokens", [16, 64, 4096, 16384])
@pytest.mark.parametrize("steps", [2, 3, 8, 40, 100])
@pytest.mark.parametrize("lightning", [False, True])
def test_equals_diffusers(lightning: bool, steps: int, tokens: int) -> None:
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(MINI_FOLDER / "scheduler")
    scheduler = upstream.lightning_scheduler() if lightning else stock
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    found = sigmas(LIGHTNING_SAMPLER if lightning else BASE, steps, tokens)
    assert np.array_equal(np.array(found, np.float32), scheduler.sigmas.numpy())


@pytest.mark.parametrize(
    ("steps", "levels"),
    [
        (4, [1, 0.9, 0.75, 0.5, 0]),
        (8, [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]),
    ],
)
def test_lightnings_levels(steps: int, levels: list[float]) -> None:
    for tokens in (64, 4096):
        assert sigmas(LIGHTNING_SAMPLER, steps, tokens) == pytest.approx(levels, abs=1e-4)


def test_a_step_rounds_as_diffusers_does() -> None:
    scheduler = upstream.lightning_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=1.0)
    levels = [float(level) for level in scheduler.sigmas]
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(5000, generator=generator).bfloat16() for _ in range(2))
    for number in range(8):
        expected = scheduler.step(velocity, scheduler.timesteps[number], latents).prev_sample
        latents = euler_step(latents, velocity, levels[number], levels[number + 1])
        assert torch.equal(latents, expected)


def test_one_step_with_a_terminal_level_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        sigmas(BASE, 1, 64)
    assert caught.value.field == "num_inference_steps"
    assert sigmas(LIGHTNING_SAMPLER, 1, 64) == [1.0, 0.0]
