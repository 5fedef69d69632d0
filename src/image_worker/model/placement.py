"""Where weights shall live: a plan, computed from sizes and free memory before anything is loaded.

`offload.py` carries it out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from image_worker.compute import POSSIBLE, automatic
from image_worker.errors import DoesNotFit
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)

GIB = 2**30

# Measured at full size on one card by `python -m image_worker.bench.full_size`: peak working
# memory above the weights, per image or text token and unit of model width, and per pixel and unit
# of the VAE's base width (decoding; encoding takes 12). fp8 is taken to be as 4bit; attention in
# int8 takes less than the one that was measured, and so do products of 8bit in int8 than
# bitsandbytes' own, by the sizes of what they keep.
DENOISE_BYTES = {"bf16": 21, "fp8": 24, "8bit": 45, "4bit": 24}
ZERO_COND_BYTES = 12  # more while denoising with `zero_cond_t`: modulation per token, not per row
VAE_BYTES = 14
TILE_SIDE = 512  # pixels; a tile's working memory is that of a picture of this size
FP8_SHARE = 0.75  # of the free memory, at most, for fp8 by itself: the rest is for batches
# The CUDA libraries' own memory, the allocator's gaps, and room for weights decoded from 4 bits:
# 72 MiB in 8 bits, 144 in 16.
RESERVE = GIB // 2

# CPUs, in torch's words, on which a product in bf16 takes 7 times as long as in float32.
_SLOW_IN_BF16 = ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of the machine. Without a card, memory is not planned.

    capability: the card's compute capability.
    """

    name: str
    free: int | None = None
    has_bf16: bool = True
    capability: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device("cpu" if self.free is None else "cuda")


def detect_hardware(settings: Settings) -> Hardware:
    """Looks at the card, and makes `GPU_MAX_GIB` a limit that the process cannot exceed."""
    if not torch.cuda.is_available():
        return Hardware(
            name="CPU", has_bf16=torch.backends.cpu.get_cpu_capability() not in _SLOW_IN_BF16
        )
    free, total = torch.cuda.mem_get_info()
    if settings.gpu_max_gib is not None:
        limit = int(settings.gpu_max_gib * GIB)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        free = min(free, limit)
    capability = torch.cuda.get_device_capability()
    return Hardware(
        name=torch.cuda.get_device_name(),
        free=free,
        has_bf16=capability >= (8, 0),
        capability=capability,
    )


@dataclass(frozen=True)
class Sizes:
    """Bytes of each component's weights at one precision."""

    text_encoder: int
    transformer: int
    vae: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.text_encoder + self.transformer + self.vae


@dataclass(frozen=True)
class Shape:
    """What working memory depends on: the model's widths, and the usual job's tokens and pixels."""

    width: int
    zero_cond_t: bool
    vae_base: int
    tokens: int
    pixels: int


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it is forecast to take.

    max_tokens: tokens in one forward of the transformer; max_pixels: the largest picture that the
    VAE decodes without tiles (both None: no limit); peak: forecast bytes for the usual job;
    token_bytes: forecast working memory of a forward, per token. None: memory is not planned.
    """

    precision: Precision
    offload: Literal["none", "model"]
    max_tokens: int | None
    max_pixels: int | None
    peak: int | None
    token_bytes: int | None = None

    def describe(self) -> str:
        """One line for the log."""
        place = "everything on the device" if self.offload == "none" else "one component at a time"
        peak = "" if self.peak is None else f", forecast peak {self.peak / GIB:.1f} GiB"
        return f"{self.precision}, {place}{peak}"

    def tokens_within(self, free: int) -> int | None:
        """Tokens of a forward that fits into so many bytes; None where memory is not planned."""
        return None if self.token_bytes is None else max(0, free - RESERVE) // self.token_bytes


def plan(
    settings: Settings, sizes: Mapping[Precision, Sizes], shape: Shape, hardware: Hardware
) -> Plan:
    """Chooses precision and offload: the first that fits, the most exact and fastest first.

    "auto" passes over 8bit, since bitsandbytes' int8 takes over twice as long as its NF4; and over
    fp8 where the card cannot multiply it.

    Raises:
        DoesNotFit: nothing that the settings allow fits; says what it would take.
    """
    tried: list[str] = []
    for precision, offload in _choices(settings, hardware):
        plan = _fit(precision, offload, sizes[precision], shape, hardware)
        share = FP8_SHARE if precision == "fp8" and settings.precision_mode == "auto" else 1.0
        if plan.peak is None or hardware.free is None or plan.peak <= share * hardware.free:
            if tried and settings.precision_mode != "auto":
                log.warning("%s; so with CPU offload", "; ".join(tried))
            return plan
        tried.append(f"{precision} with CPU_OFFLOAD={offload} takes {plan.peak / GIB:.1f} GiB")
    assert hardware.free is not None
    raise DoesNotFit(
        f"the model does not fit: {hardware.free / GIB:.1f} GiB are free on {hardware.name}; "
        + "; ".join(tried)
    )


def _choices(
    settings: Settings, hardware: Hardware
) -> Iterator[tuple[Precision, Literal["none", "model"]]]:
    wanted = settings.precision_mode
    if settings.int8_cpu_offload:
        yield "8bit", "model"
        return
    by_itself: list[Precision] = ["bf16", "4bit"]
    bf16 = settings.bnb_compute == "bf16"
    multiplies_fp8 = automatic("fp8", hardware.capability, bf16=bf16) == "fp8"
    if multiplies_fp8 and settings.compute in ("auto", "fp8"):
        by_itself.insert(1, "fp8")
    if settings.compute != "auto":
        by_itself = [one for one in by_itself if settings.compute in POSSIBLE[one]]
    precisions = by_itself if wanted == "auto" else [wanted]
    if settings.cpu_offload != "model":
        yield from ((precision, "none") for precision in precisions)
    if settings.cpu_offload != "none":
        yield from ((precision, "model") for precision in precisions)


def _fit(
    precision: Precision,
    offload: Literal["none", "model"],
    sizes: Sizes,
    shape: Shape,
    hardware: Hardware,
) -> Plan:
    if hardware.free is None:
        return Plan(precision, "none", None, None, None)
    extra = ZERO_COND_BYTES if shape.zero_cond_t else 0
    per_token = (DENOISE_BYTES[precision] + extra) * shape.width
    per_pixel = VAE_BYTES * shape.vae_base
    while_denoising = sizes.total if offload == "none" else sizes.transformer
    while_decoding = sizes.total if offload == "none" else sizes.vae
    room_to_decode = hardware.free - while_decoding - RESERVE
    tile = min(shape.pixels, TILE_SIDE**2)
    decoded_at_once = shape.pixels if room_to_decode >= shape.pixels * per_pixel else tile
    return Plan(
        precision,
        offload,
        max_tokens=max(shape.tokens, (hardware.free - while_denoising - RESERVE) // per_token),
        max_pixels=max(0, room_to_decode // per_pixel),
        peak=RESERVE
        + max(
            while_denoising + shape.tokens * per_token,
            while_decoding + decoded_at_once * per_pixel,
            sizes.text_encoder,
        ),
        token_bytes=per_token,
    )
