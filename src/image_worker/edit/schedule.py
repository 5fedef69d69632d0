"""The noise levels that a picture passes through."""

from __future__ import annotations

import math

import numpy as np

from image_worker.catalog import Sampler
from image_worker.errors import InvalidRequest


def sigmas(sampler: Sampler, steps: int, target_tokens: int) -> list[float]:
    """`steps` noise levels from 1 downwards, and the final 0: `steps` + 1 numbers in [0, 1].

    sigma' = e^mu / (e^mu + 1/sigma - 1), mu linear in the token count (Esser et al., 2024,
    section 5.3.2), then stretched so that the last level before 0 is `sampler.terminal`. Computed
    in float32 in the order of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Raises:
        InvalidRequest: as `check_steps`.
    """
    check_steps(sampler, steps)
    slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_tokens - sampler.base_tokens)
    shift = math.exp(slope * target_tokens + (sampler.base_shift - slope * sampler.base_tokens))
    levels = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    levels = shift / (shift + (1.0 / levels - 1.0))
    if sampler.terminal is not None:
        gone = 1.0 - levels
        levels = 1.0 - gone / (gone[-1] / (1.0 - sampler.terminal))
    return [*(float(level) for level in levels), 0.0]


def check_steps(sampler: Sampler, steps: int) -> None:
    """Refuses a step count for which there is no schedule.

    Raises:
        InvalidRequest: one step with a terminal level, which leaves nothing to stretch.
    """
    if steps == 1 and sampler.terminal is not None:
        raise InvalidRequest(
            "1 step is not possible with this model's schedule; use 2 or more",
            field="num_inference_steps",
        )
