"""The scale of latents: what the VAE makes is not what the transformer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def statistics(vae: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each (1, channels, 1, 1)."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1).to(device, dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
