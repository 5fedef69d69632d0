"""Looks at where weights are and may be. Asks no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from image_worker.catalog import ModelEntry
from image_worker.commands.facts import Downloads, Places, PreparedFolder
from image_worker.commands.fetched import InUse, fetched
from image_worker.commands.removable import MANIFEST, made_of, measure
from image_worker.errors import WorkerError
from image_worker.settings import Settings

VOLUME = Path("/runpod-volume")  # where RunPod mounts a network volume


def look_at_places(settings: Settings, entry: ModelEntry, volume: Path = VOLUME) -> Places:
    """MODEL_DIR, and what is there of the model that would be served."""
    folder = settings.model_dir
    existing = next(
        (path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/")
    )
    try:
        free = shutil.disk_usage(existing).free
    except OSError:
        free = None
    has_model, problem = _has_model(settings, entry)
    return Places(
        model_dir=str(folder),
        free=free,
        writable=os.access(existing, os.W_OK | os.X_OK)
        and (not folder.exists() or folder.is_dir()),
        has_model=has_model,
        has_adapter=_has_adapter(settings, entry),
        partial=0 if has_model else _partial(folder, settings.model_id or entry.repo),
        problem=problem,
        prepared=_prepared(folder / "prepared"),
        volume=volume.is_dir(),
        in_volume=folder.resolve().is_relative_to(volume),
        downloads=_downloads(folder),
    )


def has_token() -> bool:
    """Whether the hub is asked with one."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return False
    return get_token() is not None


def _has_model(settings: Settings, entry: ModelEntry) -> tuple[bool, str | None]:
    """Whether it is there, and what a start would refuse before it downloads."""
    try:
        from image_worker.model import files, sources

        sources.ranges_of(entry, settings)
        return files.model_here(entry, settings) is not None, None
    except ImportError:  # told as a missing package
        return False, None
    except WorkerError as error:
        return False, str(error)


def _has_adapter(settings: Settings, entry: ModelEntry) -> bool:
    try:
        from image_worker.model import files, sources

        here = settings.model_copy(update={"local_only": True})
        for file in sources.loras_of(entry, settings):
            files.find_adapter(file, here)
    except (ImportError, WorkerError):
        return False
    return True


def _partial(model_dir: Path, repo: str) -> int:
    """Bytes of it in the hub's cache, whole files and cut off ones."""
    return measure(model_dir / f"models--{repo.replace('/', '--')}" / "blobs")[0]


def _downloads(folder: Path) -> tuple[Downloads, ...]:
    """What `clean` would find, whole files alone."""
    items = fetched(folder, 0.0, InUse())
    found = []
    for kind in ("loras", "checkpoints"):
        sizes = [item.size for item in items if item.kind == kind]
        if sizes:
            found.append(Downloads(kind, len(sizes), sum(sizes)))
    return tuple(found)


def _prepared(home: Path) -> tuple[PreparedFolder, ...]:
    found = []
    for manifest in sorted(home.glob(f"[!.]*/{MANIFEST}")):
        model, precision = made_of(manifest.parent) or ("?", "?")
        size, _ = measure(manifest.parent)
        found.append(PreparedFolder(manifest.parent.name, model, precision, size))
    return tuple(found)
