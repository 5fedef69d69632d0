"""What is computed in what: the model's own type, its products, its attention."""

from __future__ import annotations

import logging

import torch

from image_worker.compute import LEAST, POSSIBLE, Compute, automatic, possible
from image_worker.errors import InvalidSettings
from image_worker.model.hardware import Hardware
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)


def choose_dtype(settings: Settings, hardware: Hardware) -> torch.dtype:
    """The type in which the model computes."""
    if settings.bnb_compute == "fp16":
        return torch.float16
    if hardware.has_bf16:
        return torch.bfloat16
    if hardware.free is None:
        log.info("this CPU has no bfloat16: computing in float32")
        return torch.float32
    log.warning("%s has no bfloat16: computing in float16", hardware.name)
    return torch.float16


def choose_products(
    settings: Settings, precision: Precision, hardware: Hardware, dtype: torch.dtype
) -> Compute:
    """What the transformer, with its weights at that precision, multiplies in.

    Raises:
        InvalidSettings: the card, or the way the weights are stored, does not allow what is asked.
    """
    bf16 = dtype == torch.bfloat16
    if settings.compute == "auto":
        return automatic(precision, hardware.capability, bf16=bf16)
    if settings.compute not in possible(precision, hardware.capability, bf16=bf16):
        precisions = [name for name, ways in POSSIBLE.items() if settings.compute in ways]
        needed = [f"PRECISION_MODE={' or '.join(precisions)}"]
        if settings.compute == "fp8":
            needed.append("BNB_COMPUTE=bf16")
        if hardware.capability is not None:
            least = ".".join(map(str, LEAST[settings.compute]))
            needed.append(f"a card of compute capability {least} or later")
        raise InvalidSettings(
            f"COMPUTE={settings.compute} is impossible with {precision} weights and numbers in "
            f"{name_of(dtype)} on {hardware.name}: it takes {', '.join(needed)}"
        )
    return settings.compute


def attends_in_int8(settings: Settings, hardware: Hardware, dtype: torch.dtype) -> bool:
    """Of cards, Hopper alone can; a CPU can, slowly, so that pictures can be judged without one."""
    is_hopper = hardware.capability == (9, 0)
    runs = hardware.free is None or (is_hopper and dtype == torch.bfloat16)
    if settings.attention == "int8" and not runs:
        raise InvalidSettings(
            f"ATTENTION=int8 is impossible with numbers in {name_of(dtype)} on {hardware.name}: it "
            "takes bfloat16 and a Hopper card (compute capability 9.0), such as H100 or H200"
        )
    return settings.attention == "int8" or (settings.attention == "auto" and is_hopper and runs)


def name_of(dtype: torch.dtype) -> str:
    """As torch spells it, without its own name."""
    return str(dtype).removeprefix("torch.")


def tell(dtype: torch.dtype, compute: Compute, *, int8_attention: bool) -> None:
    """Logs what is computed in what."""
    own = name_of(dtype)
    log.info(
        "numbers in %s, products in %s, attention in %s",
        own,
        own if compute == "bf16" else compute,
        "int8" if int8_attention else own,
    )
