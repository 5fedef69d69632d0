"""Settings that are valid alone and not together: refused at the start, never passed over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from image_worker.compute import POSSIBLE
from image_worker.errors import InvalidSettings
from image_worker.lora_sources import LoraSources

if TYPE_CHECKING:
    from image_worker.settings import Settings


def refuse(settings: Settings) -> None:
    """
    Raises:
        InvalidSettings: says what contradicts what, and what to do.
    """
    _of_files(settings)
    _of_storage(settings)
    _of_loras(settings)
    _of_weights(settings)
    _of_svdq(settings)
    _of_products(settings)
    _of_offloading(settings)


def _of_files(settings: Settings) -> None:
    for name in ("checkpoint_lightning", "checkpoint_decode"):
        is_set = getattr(settings, name) != type(settings).model_fields[name].default
        if settings.checkpoint is None and is_set:
            raise InvalidSettings(f"{name.upper()} has no meaning without CHECKPOINT; drop it")
    if settings.keep_prepared != "whole":
        return
    if settings.checkpoint is not None:
        raise InvalidSettings(
            "KEEP_PREPARED=whole has no meaning with CHECKPOINT, of which each start reads the "
            "layers that it would keep; set it to 1"
        )
    for name in ("text_encoder_checkpoint", "svdq_ranges"):
        if getattr(settings, name) is not None:
            raise InvalidSettings(
                f"KEEP_PREPARED=whole has no meaning with {name.upper()}, whose file must be there "
                "at each start; set it to 1"
            )


def _of_storage(settings: Settings) -> None:
    needed = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key")
    missing = [name.upper() for name in needed if getattr(settings, name) is None]
    if missing and (len(missing) < len(needed) or settings.bucket_name is not None):
        raise InvalidSettings(
            f"storage needs {', '.join(missing)}, too; or unset all BUCKET_ variables"
        )


def _of_loras(settings: Settings) -> None:
    has_folder = LoraSources.parse(settings.lora_sources).folder
    if settings.lora_dir is not None and not has_folder:
        raise InvalidSettings(
            f"LORA_DIR={settings.lora_dir} has no meaning with "
            f"LORA_SOURCES={settings.lora_sources}; add folder to these, or drop it"
        )


def _of_weights(settings: Settings) -> None:
    if settings.quantize_components == "text" and settings.precision_mode == "bf16":
        raise InvalidSettings(
            "QUANTIZE_COMPONENTS=text has no meaning with PRECISION_MODE=bf16; drop one"
        )
    if settings.attention == "int8" and settings.bnb_compute != "bf16":
        raise InvalidSettings("ATTENTION=int8 is for BNB_COMPUTE=bf16; drop one")


def _of_svdq(settings: Settings) -> None:
    if settings.precision_mode != "svdq":  # which auto never takes
        for name in ("svdq_rank", "svdq_ranges"):
            if getattr(settings, name) != type(settings).model_fields[name].default:
                raise InvalidSettings(
                    f"{name.upper()} has no meaning with "
                    f"PRECISION_MODE={settings.precision_mode}; drop it, or set PRECISION_MODE=svdq"
                )
    if settings.svdq_ranges is not None and settings.quantize_components == "text":
        raise InvalidSettings(
            "SVDQ_RANGES has no meaning with QUANTIZE_COMPONENTS=text, since they are of the "
            "transformer; drop one"
        )


def _of_products(settings: Settings) -> None:
    if settings.checkpoint is not None and not settings.checkpoint_decode:
        return  # by whose format it is decided, once that is known
    compute = settings.compute
    if compute in ("auto", "bf16"):
        return
    precisions = [name for name, ways in POSSIBLE.items() if compute in ways]
    needed = f"PRECISION_MODE={' or '.join(precisions)}, QUANTIZE_COMPONENTS=all"
    if compute == "fp8":
        needed += ", BNB_COMPUTE=bf16"
    if (
        settings.precision_mode not in ("auto", *precisions)
        or settings.quantize_components != "all"
        or (compute == "fp8" and settings.bnb_compute != "bf16")
    ):
        raise InvalidSettings(f"COMPUTE={compute} is for {needed}; drop it, or set these")


def _of_offloading(settings: Settings) -> None:
    if not settings.int8_cpu_offload:
        return
    if settings.cpu_offload == "none":
        raise InvalidSettings("INT8_CPU_OFFLOAD=1 contradicts CPU_OFFLOAD=none; drop one")
    if settings.precision_mode not in ("auto", "8bit"):
        raise InvalidSettings(
            f"INT8_CPU_OFFLOAD=1 contradicts PRECISION_MODE={settings.precision_mode}; "
            "use CPU_OFFLOAD=stream to offload at another precision"
        )
