"""Finds a model's files: a local folder, RunPod's model cache, `MODEL_DIR`, then the hub.

`MODEL_DIR` is laid out as a Hugging Face cache, so it can hold several models and revisions side
by side, downloads resume, and workers that share a volume do not disturb each other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from image_worker.catalog import HubFile, ModelEntry
from image_worker.errors import InvalidSettings, ModelMismatch, ModelUnavailable
from image_worker.model import caches, in_folder, selection
from image_worker.model.download import Snapshot
from image_worker.settings import Settings

log = logging.getLogger(__name__)

RUNPOD_CACHE = Path("/runpod-volume/huggingface-cache/hub")
COMPONENTS = ("text_encoder", "transformer", "vae")


def find_model(entry: ModelEntry, settings: Settings, *, weights: bool = True) -> Path:
    """The folder, in diffusers layout, that holds every file this worker reads.

    weights: otherwise one suffices that has all but the weights. A folder that `MODEL_ID` names
    must have them in any case. Those of the transformer are not needed beside a `CHECKPOINT`, nor
    those of the text encoder beside a `TEXT_ENCODER_CHECKPOINT`.

    Raises:
        ModelUnavailable: files are missing and may not, or cannot, be downloaded.
    """
    repo = _repo(entry, settings)
    if isinstance(repo, Path):
        return _complete(repo, entry, _with_weights(settings))
    wanted = _with_weights(settings) if weights else ()
    found = _Model(entry, repo, _revision(entry, settings), wanted)
    place, reasons = caches.look(_caches(settings), found.name, found.in_cache, log.warning)
    return place or _download(found.name, settings, reasons, found.download)


def model_here(entry: ModelEntry, settings: Settings) -> Path | None:
    """The same folder, if it is on this machine."""
    repo = _repo(entry, settings)
    if isinstance(repo, Path):
        return _complete(repo, entry, _with_weights(settings))
    found = _Model(entry, repo, _revision(entry, settings), _with_weights(settings))
    return caches.look(_caches(settings), found.name, found.in_cache, log.debug)[0]


def model_in_model_dir(entry: ModelEntry, settings: Settings) -> Path | None:
    """The folder of the same model in `MODEL_DIR`'s cache, whatever is in it; None: none there."""
    repo = _repo(entry, settings)
    if isinstance(repo, Path):
        return None
    return caches.snapshot(repo, _revision(entry, settings), settings.model_dir)


def find_adapter(file: HubFile, settings: Settings, cache: Path | None = None) -> Path:
    """The path of one file of the operator's. cache: for downloads, instead of `MODEL_DIR`.

    Raises:
        ModelUnavailable: the file is missing and may not, or cannot, be downloaded.
    """
    if (folder := Path(file.repo)).is_dir():
        if not (path := folder / file.path).is_file():
            raise ModelUnavailable(f"the adapter file {file.path} is missing")
        return path
    others = [other for other in _caches(settings) if cache or other != settings.model_dir]
    return find_on_hub(file, settings, cache or settings.model_dir, others)


def find_on_hub(
    file: HubFile,
    settings: Settings,
    cache: Path,
    others: Iterable[Path] = (),
    *,
    max_bytes: int | None = None,
    token: bool = True,
) -> Path:
    """The path of one file of the hub, in `others`, or in `cache`, to where it is downloaded.

    max_bytes: more are not downloaded, which is a ModelMismatch; token: as of `Snapshot`; other
    errors are as of `find_adapter`.
    """

    def in_cache(cache: Path) -> Path:
        path = hf_hub_download(
            file.repo, file.path, revision=file.revision, cache_dir=cache, local_files_only=True
        )
        return Path(path)

    def download(settings: Settings) -> Path:
        snapshot = Snapshot(file.repo, file.revision, cache, settings.download_timeout, token)
        if max_bytes is not None and snapshot.size(file.path) > max_bytes:
            raise ModelMismatch(f"{file.path} has more than {max_bytes / 1e6:g} MB")
        return snapshot.fetch([file.path]) / file.path

    name = f"{file.repo}/{file.path}@{file.revision}"
    place, reasons = caches.look([*others, cache], name, in_cache, log.warning)
    return place or _download(name, settings, reasons, download)


def adapter_place(file: HubFile, settings: Settings) -> Path | None:
    """Where a cache has an adapter file, or would have it.

    None: which commit's it is, nothing on this machine says; or it is not from the hub.
    """
    if Path(file.repo).is_dir():
        return None
    snapshots = [caches.snapshot(file.repo, file.revision, cache) for cache in _caches(settings)]
    places = [folder / file.path for folder in snapshots if folder is not None]
    there = [path for path in places if path.is_file()]
    return next(iter([*there, *places]), None)


@dataclass(frozen=True)
class _Model:
    """On the hub. weights: the components whose weights are wanted; small files are, of all."""

    entry: ModelEntry
    repo: str
    revision: str
    weights: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision}"

    def in_cache(self, cache: Path) -> Path:
        # Patterns would ask for all that match them, also for what is not needed.
        found = snapshot_download(
            self.repo,
            revision=self.revision,
            cache_dir=cache,
            allow_patterns=[],
            local_files_only=True,
        )
        folder = Path(found)
        try:
            listed = get_cached_repo_tree(self.repo, revision=self.revision, cache_dir=cache)
        except CachedRepoTreeNotFoundError:
            listed = []  # which files there are, only the hub knows
        missing = [
            path
            for path in self._wanted((file.path for file in listed), folder)
            if not (folder / path).is_file()
        ]
        if missing:
            raise ModelUnavailable(f"the model folder is incomplete: {', '.join(missing)} missing")
        return _complete(folder, self.entry, self.weights)

    def download(self, settings: Settings) -> Path:
        snapshot = Snapshot(self.repo, self.revision, settings.model_dir, settings.download_timeout)
        paths = selection.needed(snapshot.paths, self._patterns)
        found = snapshot.fetch(path for path in paths if path.endswith(selection.INDEX))
        folder = snapshot.fetch(self._wanted(snapshot.paths, found))
        return _complete(folder, self.entry, self.weights)

    @property
    def _patterns(self) -> list[str]:
        return [f"{name}/*" for name in _folders(self.entry)]

    def _wanted(self, paths: Iterable[str], folder: Path) -> list[str]:
        """Of the repo's files; its indices are in `folder`."""
        found = selection.needed(paths, self._patterns)
        found = selection.without_other_weights(found, _indices(folder, found))
        return [
            path
            for path in found
            if not path.endswith(selection.WEIGHTS) or path.partition("/")[0] in self.weights
        ]


def _repo(entry: ModelEntry, settings: Settings) -> str | Path:
    """The model's repo on the hub, or its folder."""
    repo = settings.model_id or entry.repo
    folder = Path(repo).expanduser()
    if folder.is_dir():
        if settings.model_revision:
            raise InvalidSettings("MODEL_REVISION has no meaning for a local folder; unset it")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InvalidSettings(
            f"MODEL_ID={repo!r} is neither a folder that exists nor a repo (owner/name)"
        )
    if (settings.model_dir / "model_index.json").exists():
        raise ModelUnavailable(
            "MODEL_DIR is itself a model folder, and which model it holds is not known; "
            "name that folder in MODEL_ID and say with MODEL which model it is"
        )
    return repo


def _revision(entry: ModelEntry, settings: Settings) -> str:
    return settings.model_revision or ("main" if settings.model_id else entry.revision)


def _download(
    name: str, settings: Settings, reasons: Sequence[str], fetch: Callable[[Settings], Path]
) -> Path:
    """Unless `LOCAL_ONLY`, from the hub."""
    if settings.local_only:
        here = f"as a whole ({'; '.join(reasons)})" if reasons else "at all"
        raise ModelUnavailable(
            f"{name} is not on this machine {here}, and LOCAL_ONLY=1 forbids downloads"
        )
    log.info("downloading %s", name)
    return fetch(settings)


def _indices(folder: Path, paths: Iterable[str]) -> dict[str, list[str]]:
    """What the indices among `paths` name, as far as they are in `folder`."""
    indices = [path for path in paths if path.endswith(selection.INDEX)]
    return {path: in_folder.shards(folder / path) for path in indices if (folder / path).is_file()}


def _caches(settings: Settings) -> Iterator[Path]:
    for cache in (RUNPOD_CACHE, settings.model_dir):
        if cache.is_dir():
            yield cache


def _with_weights(settings: Settings) -> tuple[str, ...]:
    """Components whose weights are the model's own."""
    instead = {
        "transformer": settings.checkpoint,
        "text_encoder": settings.text_encoder_checkpoint,
    }
    return tuple(name for name in COMPONENTS if not instead.get(name))


def _folders(entry: ModelEntry) -> tuple[str, ...]:
    reads_pictures = ("processor",) if entry.max_images else ()
    return (*COMPONENTS, "tokenizer", "scheduler", *reads_pictures)


def _complete(folder: Path, entry: ModelEntry, weights: Sequence[str]) -> Path:
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
    for name in weights:
        in_folder.weight_files(folder / name)
    return folder
