"""Finds a model's files: a local folder, RunPod's model cache, `MODEL_DIR`, then the hub.

`MODEL_DIR` is laid out as a Hugging Face cache, so it can hold several models and revisions side
by side, downloads resume, and workers that share a volume do not disturb each other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from image_worker.catalog import HubFile, ModelEntry
from image_worker.errors import ModelUnavailable
from image_worker.settings import Settings

log = logging.getLogger(__name__)

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
COMPONENTS = ("text_encoder", "transformer", "vae")


def find_model(entry: ModelEntry, settings: Settings) -> Path:
    """The folder, in diffusers layout, that holds every file this worker reads.

    Raises:
        ModelUnavailable: files are missing and may not, or cannot, be downloaded.
    """
    repo = settings.model_id or entry.repo
    if Path(repo).is_dir():
        return _complete(Path(repo), entry)
    if (settings.model_dir / "model_index.json").exists():
        raise ModelUnavailable(
            "MODEL_DIR is itself a model folder, and which model it holds is not known; "
            "name that folder in MODEL_ID and say with MODEL which model it is"
        )
    revision = settings.model_revision or ("main" if settings.model_id else entry.revision)
    patterns = [f"{folder}/*" for folder in _folders(entry)]

    def fetch(cache: Path, local: bool) -> Path:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            allow_patterns=patterns,
            ignore_patterns=["*.bin", "*.msgpack", "*.h5"],
            local_files_only=local,
        )
        return _complete(Path(folder), entry)

    return _first_place(f"{repo}@{revision}", settings, fetch)


def find_adapter(file: HubFile, settings: Settings) -> Path:
    """The path of one adapter file.

    Raises:
        ModelUnavailable: the file is missing and may not, or cannot, be downloaded.
    """
    if Path(file.repo).is_dir():
        path = Path(file.repo) / file.path
        if not path.is_file():
            raise ModelUnavailable(f"the adapter file {file.path} is missing")
        return path

    def fetch(cache: Path, local: bool) -> Path:
        return Path(
            hf_hub_download(
                file.repo,
                file.path,
                revision=file.revision,
                cache_dir=cache,
                local_files_only=local,
            )
        )

    return _first_place(f"{file.repo}/{file.path}@{file.revision}", settings, fetch)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, in the order in which they are read.

    Raises:
        ModelUnavailable: there are none, or the index names files that are not there.
    """
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        shards = json.loads(index.read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = ", ".join(missing) if missing else "its .safetensors weights"
        raise ModelUnavailable(f"{folder.name}/ of the model is incomplete: {what} missing")
    return files


def _first_place(name: str, settings: Settings, fetch: Callable[[Path, bool], Path]) -> Path:
    """Tries the caches, then, unless `LOCAL_ONLY`, the hub."""
    for cache in _caches(settings):
        try:
            return fetch(cache, True)
        except (LocalEntryNotFoundError, ModelUnavailable) as error:
            log.debug("%s is not complete in %s: %s", name, cache, error)
    if settings.local_only:
        raise ModelUnavailable(f"{name} is not on this machine, and LOCAL_ONLY=1 forbids downloads")
    log.info("downloading %s to %s", name, settings.model_dir)
    try:
        return fetch(settings.model_dir, False)
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"{name} does not exist on the hub, or needs a token (HF_TOKEN) that was not given"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(
            f"{name} could not be downloaded ({type(error).__name__}); check that the hub can be "
            "reached and that MODEL_DIR can be written and has room"
        ) from error


def _caches(settings: Settings) -> Iterator[Path]:
    for cache in (RUNPOD_CACHE, settings.model_dir):
        if cache.is_dir():
            yield cache


def _folders(entry: ModelEntry) -> tuple[str, ...]:
    reads_pictures = ("processor",) if entry.max_images else ()
    return (*COMPONENTS, "tokenizer", "scheduler", *reads_pictures)


def _complete(folder: Path, entry: ModelEntry) -> Path:
    for name in _folders(entry):
        if not (folder / name).is_dir():
            raise ModelUnavailable(f"the model folder has no {name}/; it needs diffusers' layout")
    for name in COMPONENTS:
        weight_files(folder / name)
    return folder
