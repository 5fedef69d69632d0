"""Finds a model's files: a local folder, RunPod's model cache, `MODEL_DIR`, then the hub.

`MODEL_DIR` is laid out as a Hugging Face cache, so it can hold several models and revisions side
by side, downloads resume, and workers that share a volume do not disturb each other.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from image_worker.catalog import HubFile, ModelEntry
from image_worker.errors import InvalidSettings, ModelMismatch, ModelUnavailable
from image_worker.model import selection
from image_worker.model.download import Snapshot
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
    folder = Path(repo).expanduser()
    if folder.is_dir():
        if settings.model_revision:
            raise InvalidSettings("MODEL_REVISION has no meaning for a local folder; unset it")
        return _complete(folder, entry)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InvalidSettings(
            f"MODEL_ID={repo!r} is neither a folder that exists nor a repo (owner/name)"
        )
    if (settings.model_dir / "model_index.json").exists():
        raise ModelUnavailable(
            "MODEL_DIR is itself a model folder, and which model it holds is not known; "
            "name that folder in MODEL_ID and say with MODEL which model it is"
        )
    revision = settings.model_revision or ("main" if settings.model_id else entry.revision)
    patterns = [f"{folder}/*" for folder in _folders(entry)]

    def in_cache(cache: Path) -> Path:
        # Patterns would ask for all that match them, also for what is not needed.
        found = snapshot_download(
            repo, revision=revision, cache_dir=cache, allow_patterns=[], local_files_only=True
        )
        _check_listing(repo, revision, cache, patterns, Path(found))
        return _complete(Path(found), entry)

    def download() -> Path:
        snapshot = Snapshot(repo, revision, settings.model_dir, settings.download_timeout)
        paths = selection.needed(snapshot.paths, patterns)
        found = snapshot.fetch(path for path in paths if path.endswith(selection.INDEX))
        paths = selection.without_other_weights(paths, _indices(found, paths))
        return _complete(snapshot.fetch(paths), entry)

    return _first_place(f"{repo}@{revision}", settings, in_cache, download)


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

    def in_cache(cache: Path) -> Path:
        path = hf_hub_download(
            file.repo, file.path, revision=file.revision, cache_dir=cache, local_files_only=True
        )
        return Path(path)

    def download() -> Path:
        snapshot = Snapshot(file.repo, file.revision, settings.model_dir, settings.download_timeout)
        return snapshot.fetch([file.path]) / file.path

    name = f"{file.repo}/{file.path}@{file.revision}"
    return _first_place(name, settings, in_cache, download)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, in the order in which they are read.

    Raises:
        ModelUnavailable: there are none, or the index names files that are not there.
    """
    index = next(iter(sorted(folder.glob(f"*{selection.INDEX}"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in _shards(index)]
    numbered = re.search(r"-of-(\d+)\.safetensors$", files[0].name) if files else None
    if numbered and len(files) != int(numbered[1]):
        raise ModelUnavailable(
            f"{folder.name}/ of the model is incomplete: {len(files)} of {int(numbered[1])} shards"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = ", ".join(missing) if missing else "its .safetensors weights"
        raise ModelUnavailable(f"{folder.name}/ of the model is incomplete: {what} missing")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ModelMismatch: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelMismatch(f"{path.parent.name}/{path.name} of the model is damaged") from error
    if not isinstance(content, dict):
        raise ModelMismatch(f"{path.parent.name}/{path.name} of the model is no JSON object")
    return content


def _first_place(
    name: str,
    settings: Settings,
    in_cache: Callable[[Path], Path],
    download: Callable[[], Path],
) -> Path:
    """Tries the caches, then, unless `LOCAL_ONLY`, the hub."""
    for cache in _caches(settings):
        try:
            return in_cache(cache)
        except (LocalEntryNotFoundError, ModelUnavailable) as error:
            present = [
                path.name for path in cache.glob(f"models--*{_cache_name(name)}/snapshots/*")
            ]
            tell = log.warning if present else log.debug
            tell("%s is not complete in %s (%s); revisions there: %s", name, cache, error, present)
    if settings.local_only:
        raise ModelUnavailable(f"{name} is not on this machine, and LOCAL_ONLY=1 forbids downloads")
    log.info("downloading %s to %s", name, settings.model_dir)
    return download()


def _indices(folder: Path, paths: Iterable[str]) -> dict[str, list[str]]:
    """What the indices among `paths` name, as far as they are in `folder`."""
    indices = [path for path in paths if path.endswith(selection.INDEX)]
    return {path: _shards(folder / path) for path in indices if (folder / path).is_file()}


def _shards(index: Path) -> list[str]:
    return sorted(set(read_json(index).get("weight_map", {}).values()))


def _check_listing(
    repo: str, revision: str, cache: Path, patterns: list[str], folder: Path
) -> None:
    """Where the cache has a list of the repo's files, all that are needed must be there."""
    try:
        listed = get_cached_repo_tree(repo, revision=revision, cache_dir=cache)
    except CachedRepoTreeNotFoundError:
        return
    paths = selection.needed((file.path for file in listed), patterns)
    paths = selection.without_other_weights(paths, _indices(folder, paths))
    missing = [path for path in paths if not (folder / path).is_file()]
    if missing:
        raise ModelUnavailable(f"the model folder is incomplete: {', '.join(missing)} missing")


def _caches(settings: Settings) -> Iterator[Path]:
    for cache in (RUNPOD_CACHE, settings.model_dir):
        if cache.is_dir():
            yield cache


def _cache_name(name: str) -> str:
    """`owner--repo` for `owner/repo/file@revision`."""
    return "--".join(name.partition("@")[0].split("/")[:2])


def _folders(entry: ModelEntry) -> tuple[str, ...]:
    reads_pictures = ("processor",) if entry.max_images else ()
    return (*COMPONENTS, "tokenizer", "scheduler", *reads_pictures)


def _complete(folder: Path, entry: ModelEntry) -> Path:
    for name in _folders(entry):
        if not (folder / name).is_dir():
            raise ModelUnavailable(f"the model folder has no {name}/; it needs diffusers' layout")
    needed = [f"{name}/config.json" for name in COMPONENTS]
    needed.append("scheduler/scheduler_config.json")
    if not (folder / "tokenizer" / "vocab.json").is_file():
        needed.append("tokenizer/tokenizer.json")
    if entry.max_images:
        needed.append("processor/preprocessor_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelUnavailable(f"the model folder is incomplete: {', '.join(missing)} missing")
    for name in COMPONENTS:
        weight_files(folder / name)
    return folder
