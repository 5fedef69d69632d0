"""The autoencoder's training, and pictures to latents and back with it.

Trained is what is served: one frame, so only the last time slice of each kernel (see
`image_worker.model.vae`); `tools.miniature.package` puts the slices back into the full model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from image_worker.edit.latents import statistics
from image_worker.model.configs import VaeConfig
from image_worker.model.vae import Vae
from tools.miniature import architecture
from tools.miniature.train.graph import Graph
from tools.miniature.train.optimiser import Optimiser

BATCH = 64
_ENCODED_AT_ONCE = 1024
_PEAK_RATE = 1.5e-3
_STATISTICS = ("latents_mean", "latents_std")
_PRIOR_WEIGHT = 1e-4  # of the KL divergence, against a mean squared error over [-1, 1]


def new() -> Any:
    """The autoencoder for single pictures with random weights, in bf16."""
    vae = Vae(VaeConfig.parse(architecture.vae().config))
    return vae.bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save(vae: Any, folder: Path) -> None:
    """Its weights and the statistics of its latents."""
    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file(state, folder / "vae.safetensors")
    statistics = {name: torch.tensor(getattr(vae.config, name)) for name in _STATISTICS}
    save_file(statistics, folder / "statistics.safetensors")


def load(folder: Path, device: torch.device) -> Any:
    """What `save` saved."""
    vae = new().to(device)
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    statistics = load_file(folder / "statistics.safetensors")
    set_statistics(vae, **{name: statistics[name].tolist() for name in _STATISTICS})
    return vae


def set_statistics(vae: Any, latents_mean: list[float], latents_std: list[float]) -> None:
    """Of its latents, per channel, in the configuration."""
    vae.config = dataclasses.replace(
        vae.config, latents_mean=tuple(latents_mean), latents_std=tuple(latents_std)
    )


def train(
    vae: Any, pictures: Callable[[], Tensor], steps: int, report: Callable[..., None]
) -> None:
    """Trains in place. `pictures` gives `BATCH` of them in [0, 1]; it becomes part of a graph."""
    kernels = [p for p in vae.parameters() if p.ndim == 4]
    optimiser = Optimiser(kernels, [p for p in vae.parameters() if p.ndim != 4])
    loss_of = torch.compile(_loss, dynamic=False)

    def step() -> Tensor:
        error, prior = loss_of(vae, pictures())
        (error + _PRIOR_WEIGHT * prior).backward()
        optimiser.step()
        return torch.stack([error, prior]).detach()

    graph = Graph(step)
    for number in range(steps):
        optimiser.set_rate(_PEAK_RATE, number, steps)
        error, prior = graph()
        if number % 1000 == 999:
            report(f"vae step {number + 1}: {_psnr(error):.2f} dB, prior {prior.item():.2f}")


def _loss(vae: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of what is decoded from a sample, and KL divergence per latent."""
    x = (2 * pictures - 1).bfloat16()
    mean, log_variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    decoded = vae.decoder(vae.post_quant_conv(sample.bfloat16()))
    prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (decoded.float() - x.float()).square().mean(), prior


def _psnr(error: Tensor) -> float:
    return float(10 * torch.log10(4 / error))


@torch.no_grad()
def measure_statistics(vae: Any, pictures: Tensor) -> None:
    """Sets the latents' mean and deviation, per channel, in the configuration."""
    latents = torch.cat(
        [_mean_latents(vae, part) for part in pictures.split(_ENCODED_AT_ONCE)]
    ).float()
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    set_statistics(
        vae,
        latents_mean=[round(value, 4) for value in mean.tolist()],
        latents_std=[round(value, 4) for value in deviation.tolist()],
    )


def _mean_latents(vae: Any, pictures: Tensor) -> Tensor:
    """(B, channels, rows, columns), as they are served: without normalisation."""
    x = (2 * pictures - 1).bfloat16()
    return vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[0]  # type: ignore[no-any-return]


_COMPILED_MEAN_LATENTS = torch.compile(_mean_latents, dynamic=False)


def _latents(vae: Any, pictures: Tensor) -> Tensor:
    """Compiled where that pays: for whole parts on a card."""
    whole = pictures.is_cuda and len(pictures) == _ENCODED_AT_ONCE
    return (_COMPILED_MEAN_LATENTS if whole else _mean_latents)(vae, pictures)


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to normalised, packed latents (B, tokens, channels)."""
    mean, deviation = statistics(vae, pictures.device, torch.bfloat16)
    latents = torch.cat([_latents(vae, part) for part in pictures.split(_ENCODED_AT_ONCE)])
    batch, channels, rows, columns = latents.shape
    patches = ((latents - mean) / deviation).view(batch, channels, rows // 2, 2, columns // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


@torch.no_grad()
def decode(vae: Any, tokens: Tensor) -> Tensor:
    """The inverse of `encode`, for square pictures."""
    mean, deviation = statistics(vae, tokens.device, torch.bfloat16)
    batch, count, channels = tokens.shape
    side = int(count**0.5)
    patches = tokens.bfloat16().view(batch, side, side, channels // 4, 2, 2)
    latents = patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, 2 * side, 2 * side)
    pictures = [
        vae.decoder(vae.post_quant_conv(part)) for part in (latents * deviation + mean).split(256)
    ]
    return ((torch.cat(pictures).float() + 1) / 2).clamp(0, 1)
