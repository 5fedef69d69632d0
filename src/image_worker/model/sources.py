"""What a model is made from: its folder and the LoRAs that are merged, as far as they are needed.

Prepared weights that were written whole stand for the weights of both. What tells one model from
another is therefore known without them, where they come from the hub: a commit says what they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_worker import checkpoints
from image_worker.catalog import HubFile, ModelEntry
from image_worker.errors import InvalidSettings, ModelUnavailable
from image_worker.model import files, from_url
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.opening import Plain, in_own_format, open_checkpoint
from image_worker.settings import Settings

log = logging.getLogger(__name__)

_IN_CACHE = re.compile(
    r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?$"
)


@dataclass(frozen=True)
class Sources:
    """A model's folder, in diffusers' layout, and the LoRA files to merge into it.

    is_complete: all files are there. Otherwise the folder has those that are small, and a LoRA's
    path is where it would be. checkpoint: a file that the transformer's weights are in instead;
    ranges: one of activation ranges, which these are fitted to.
    """

    folder: Path
    loras: tuple[Path, ...]
    is_complete: bool = True
    checkpoint: Path | None = None
    ranges: Path | None = None


Find = Callable[[ModelEntry, Settings, Sequence[Path]], Sources]


def find_all(entry: ModelEntry, settings: Settings, more: Sequence[Path]) -> Sources:
    """Every file; what is missing is downloaded. more: LoRAs on top of Lightning.

    Raises:
        ModelUnavailable: files are missing and may not, or cannot, be downloaded.
    """
    ranges = ranges_of(entry, settings)
    folder = files.find_model(entry, settings)
    loras = [files.find_adapter(lora, settings) for lora in loras_of(entry, settings)]
    checkpoint = from_url.find_checkpoint(settings) if settings.checkpoint else None
    return Sources(folder, (*loras, *more), checkpoint=checkpoint, ranges=ranges)


def find_least(entry: ModelEntry, settings: Settings, more: Sequence[Path]) -> Sources:
    """What is there already, if it has all that is small; that is downloaded where it is missing.

    more: LoRAs on top of Lightning.

    Raises:
        ModelUnavailable: small files are missing and may not, or cannot, be downloaded.
    """
    ranges = ranges_of(entry, settings)
    whole = files.model_here(entry, settings)
    folder = whole or files.find_model(entry, settings, weights=False)
    loras = [
        files.adapter_place(lora, settings) or files.find_adapter(lora, settings)
        for lora in loras_of(entry, settings)
    ]
    is_complete = whole is not None and all(path.is_file() for path in loras)
    return Sources(folder, (*loras, *more), is_complete, ranges=ranges)


def loras_of(entry: ModelEntry, settings: Settings) -> list[HubFile]:
    """The LoRAs that are merged: Lightning's, unless it is not wanted.

    Raises:
        InvalidSettings: the model has none for that number of steps.
    """
    if not settings.use_lightning_lora or checkpoints.lightning_of(settings):
        return []
    file = entry.lightning.get(settings.lightning_steps)
    if file is None:
        raise InvalidSettings(
            f"{entry.name} has no Lightning LoRA for {settings.lightning_steps} steps; "
            "set USE_LIGHTNING_LORA=0 to go without"
        )
    return [file]


def ranges_of(entry: ModelEntry, settings: Settings) -> Path | None:
    """The file of activation ranges that the transformer's weights are to be fitted to, if any.

    Those of a model of the catalogue are for its own weights.

    Raises:
        ModelUnavailable: it is not there.
    """
    if settings.precision_mode != "svdq" or settings.quantize_components != "all":
        return None
    path = settings.svdq_ranges
    if path is None:
        is_own = settings.model_id is None and settings.checkpoint is None
        return entry.ranges if is_own else None
    if not path.is_file():
        raise ModelUnavailable(
            f"SVDQ_RANGES={path} is no file; `python -m image_worker calibrate` writes one"
        )
    return path


def open_checkpoint_of(
    found: Sources, settings: Settings, config: dict[str, Any]
) -> Checkpoint | Plain | None:
    """The file that the transformer's weights are in, if they are not the folder's.

    config: the transformer's, of the model's folder.

    Raises:
        ModelMismatch: it does not fit the model, or is not understood.
        InvalidSettings: it is not known whether Lightning is in it, or its weights cannot take it.
    """
    if found.checkpoint is None:
        return None
    expected = TransformerConfig.parse(config)
    opened = open_checkpoint(found.checkpoint, expected)
    log.info("transformer: %s, %s", found.checkpoint.name, opened.label)
    own = in_own_format(opened)
    told = own.lightning_steps if own else None
    if told and settings.checkpoint_lightning == "auto" and not checkpoints.lightning_of(settings):
        raise InvalidSettings(
            f"{found.checkpoint.name} says that Lightning for {told} steps is merged in it: set "
            f"CHECKPOINT_LIGHTNING={told}, or 0 if it is not so"
        )
    if found.ranges and own:
        raise InvalidSettings(
            f"SVDQ_RANGES has no meaning with {found.checkpoint.name}, whose weights stay in "
            f"{opened.label}; drop one"
        )
    if found.loras and own:
        raise InvalidSettings(
            f"weights in {opened.label} cannot take {found.loras[0].name}, which is to be merged; "
            "set CHECKPOINT_LIGHTNING=4 or 8 if the file has Lightning in it, or "
            "USE_LIGHTNING_LORA=0 to go without"
        )
    return opened


def facts_of_model(folder: Path, checkpoint: Path | None) -> list[list[Any]]:
    """What tells a model's weights from others, without reading them.

    Those of a Hugging Face cache need not be there. checkpoint: as of `Sources`.

    Raises:
        ModelUnavailable: those of another folder are incomplete.
    """
    instead = [checkpoint] if checkpoint else []
    if _IN_CACHE.search(folder.as_posix()):
        return facts_of_files([folder, *instead])
    shards = [
        path
        for name in files.COMPONENTS
        if not (checkpoint and name == "transformer")
        for path in files.weight_files(folder / name)
    ]
    return facts_of_files([*shards, *instead])


def facts_of_files(paths: Sequence[Path]) -> list[list[Any]]:
    """What tells files from others of the same names, without reading them.

    Files of a Hugging Face cache are told apart by the commit in their path.
    """
    found: list[list[Any]] = []
    for path in paths:
        in_cache = _IN_CACHE.search(path.as_posix())
        if in_cache:
            found.append([part for part in in_cache.groups() if part is not None])
        else:
            status = path.stat()
            found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
