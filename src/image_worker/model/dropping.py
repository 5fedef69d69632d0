"""Removes a checkpoint from `MODEL_DIR`'s hub cache, once prepared weights stand for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from image_worker.catalog import ModelEntry
from image_worker.errors import InvalidSettings
from image_worker.model import caches, files, sources
from image_worker.model.selection import WEIGHTS
from image_worker.settings import Settings


def check(entry: ModelEntry, settings: Settings) -> None:
    """Whether the checkpoint is, or would come to be, where it may be removed.

    Raises:
        InvalidSettings: says where it is instead.
    """
    here = files.model_here(entry, settings)
    own = files.model_in_model_dir(entry, settings)
    place = None
    if (here or settings.model_dir).resolve().is_relative_to(files.RUNPOD_CACHE.resolve()):
        place = "RunPod's cache"
    elif here is not None and (own is None or here.resolve() != own.resolve()):
        place = "a local folder"
    if place is not None:
        raise InvalidSettings(
            f"this model's checkpoint is in {place}, from where nothing is removed; leave out "
            "--drop-checkpoint"
        )


def drop(entry: ModelEntry, settings: Settings) -> int:
    """Removes the model's weights and the LoRAs that were merged; what is small stays.

    LoRAs that are elsewhere stay, too. Returns how many bytes are free now.
    """
    return sum(_remove(path, storage) for path, storage in _weights(entry, settings))


def _weights(entry: ModelEntry, settings: Settings) -> Iterator[tuple[Path, Path]]:
    """Each file's path in its snapshot, and its repo's folder in the cache."""
    model = files.model_in_model_dir(entry, settings)
    if model is not None:
        for name in files.COMPONENTS:
            for path in sorted((model / name).glob(f"*{WEIGHTS}")):
                yield path, model.parent.parent
    for lora in sources.loras_of(entry, settings):
        snapshot = caches.snapshot(lora.repo, lora.revision, settings.model_dir)
        if snapshot is not None:
            yield snapshot / lora.path, snapshot.parent.parent


def _remove(path: Path, storage: Path) -> int:
    """The blob before its link: who is killed between finds the link, and goes on."""
    blob = path.resolve()
    freed = 0
    is_shared = any(
        other != path and other.is_symlink() and other.resolve() == blob
        for other in (storage / "snapshots").rglob("*")
    )
    if blob.is_file() and blob.is_relative_to(storage.resolve()) and not is_shared:
        freed = blob.stat().st_size
        blob.unlink()
    path.unlink(missing_ok=True)
    return freed
