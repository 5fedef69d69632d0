"""What a model is made from: its folder and the LoRAs of all jobs, as far as they are needed.

Prepared weights that were written whole stand for the weights of both. What tells one model from
another is therefore known without them, where they come from the hub: a commit says what they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_worker import checkpoints
from image_worker.catalog import HubFile, ModelEntry
from image_worker.errors import InvalidSettings, ModelUnavailable
from image_worker.model import files, from_url, in_folder
from image_worker.settings import Settings

log = logging.getLogger(__name__)

_IN_CACHE = re.compile(
    r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?$"
)


@dataclass(frozen=True)
class Sources:
    """A model's folder, in diffusers' layout, and the LoRA files that are for all jobs.

    is_complete: all files are there. Otherwise the folder has those that are small, and a LoRA's
    path is where it would be. checkpoint: a file that the transformer's weights are in instead;
    text_encoder: one that the text encoder's are in; ranges: one of activation ranges, which
    weights are to be fitted to.
    """

    folder: Path
    loras: tuple[Path, ...]
    is_complete: bool = True
    checkpoint: Path | None = None
    text_encoder: Path | None = None
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
    text_encoder = (
        from_url.find_text_encoder(settings) if settings.text_encoder_checkpoint else None
    )
    return Sources(
        folder,
        (*loras, *more),
        checkpoint=checkpoint,
        text_encoder=text_encoder,
        ranges=ranges,
    )


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
    """The LoRAs of all jobs: Lightning's, unless it is not wanted, or is in `CHECKPOINT`.

    Raises:
        InvalidSettings: the model has none for that number of steps.
    """
    checkpoints.check_lightning(settings)
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
    path = settings.svdq_ranges and settings.svdq_ranges.expanduser()
    if path is None:
        is_own = settings.model_id is None and settings.checkpoint is None
        return entry.ranges if is_own else None
    if not path.is_file():
        raise ModelUnavailable(
            f"SVDQ_RANGES={path} is no file; `python -m image_worker calibrate` writes one"
        )
    return path


def facts_of_model(folder: Path, checkpoints: Mapping[str, Path]) -> list[list[Any]]:
    """What tells a model's weights from others, without reading them.

    Those of a Hugging Face cache need not be there. checkpoints: files that components' weights are
    in instead, by the components' names.

    Raises:
        ModelUnavailable: those of another folder are incomplete.
    """
    instead = list(checkpoints.values())
    if _IN_CACHE.search(folder.as_posix()):
        return facts_of_files([folder, *instead])
    shards = [
        path
        for name in files.COMPONENTS
        if name not in checkpoints
        for path in in_folder.weight_files(folder / name)
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
