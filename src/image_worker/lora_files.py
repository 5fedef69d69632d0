"""Files of LoRAs that jobs name: which may be named, and where they are found or downloaded to.

What jobs have downloaded is kept apart from all else, in `MODEL_DIR/loras`: from URLs by the hash
of their address, from the hub in caches of its own.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from image_worker.catalog import HubFile
from image_worker.errors import (
    InvalidLora,
    InvalidSettings,
    LoraUnavailable,
    ModelMismatch,
    ModelUnavailable,
)
from image_worker.job import loras as sources
from image_worker.job.loras import AtUrl, InFolder, OnHub, Source
from image_worker.lora_sources import LoraSources
from image_worker.model import files
from image_worker.model.retrying import is_refusal
from image_worker.settings import Settings

log = logging.getLogger(__name__)

FOLDER = "loras"  # of MODEL_DIR
WITH_TOKEN, WITHOUT_TOKEN = "hub-token", "hub"  # caches in it
FETCHED = re.compile(r"[0-9a-f]{32}\.safetensors")  # from a URL
_HUB_SECONDS = 30  # without a byte, after which a job gives up
_FILES_KEPT = 4  # as many of the largest size: what downloads from URLs may take on the disk


class LoraFiles:
    """Finds them. May be used from any thread."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            InvalidSettings: `LORA_DIR` is no folder.
        """
        self._settings = settings
        self._folder = folder_of(settings)
        self._allowed = LoraSources.parse(settings.lora_sources)
        self.max_bytes = settings.max_lora_mb * 10**6  # of a file

    def check_allowed(self, source: Source) -> None:
        """
        Raises:
            InvalidLora: jobs may not name it; says what they may.
        """
        if isinstance(source, InFolder):
            is_allowed = self._allowed.folder
        elif isinstance(source, OnHub):
            is_allowed = self._allowed.has_repo(source.repo, source.revision)
        else:
            is_allowed = self._allowed.has_url(source.url)
        if not is_allowed:
            raise InvalidLora(
                f"this worker takes LoRAs from nowhere but: {self._allowed.describe()} "
                "(LORA_SOURCES)"
            )

    def find(self, source: Source) -> Path:
        """Its path; what is not on this machine is downloaded.

        Raises:
            InvalidLora: there is none, or it may not be had.
            LoraUnavailable: it cannot be had now.
        """
        if isinstance(source, InFolder):
            return self._in_folder(source)
        if isinstance(source, OnHub):
            return self._on_hub(source)
        return self._at_url(source)

    def _in_folder(self, source: InFolder) -> Path:
        if self._folder is None:
            raise InvalidLora("this worker has no folder of LoRAs (LORA_DIR is not set)")
        path = (self._folder / source.name).resolve()
        if path.parent != self._folder or not path.is_file():
            raise InvalidLora(f"this worker's folder of LoRAs has no {source.name}")
        return path

    def _on_hub(self, source: OnHub) -> Path:
        """With the operator's token where they named the repo, and then in a cache apart: a file of
        a private repo is not to be had any more once they do not.
        """
        file = HubFile(source.repo, source.path, source.revision or "main")
        settings = self._settings.model_copy(update={"download_timeout": _HUB_SECONDS})
        named = self._allowed.names(source.repo)
        cache = self._settings.model_dir / FOLDER / (WITH_TOKEN if named else WITHOUT_TOKEN)
        try:
            return files.find_on_hub(file, settings, cache, max_bytes=self.max_bytes, token=named)
        except ModelMismatch as error:
            raise sources.too_large(self.max_bytes) from error
        except ModelUnavailable as error:
            if settings.local_only:
                raise _not_here() from error
            if error.__cause__ is None or is_refusal(error.__cause__):
                raise _not_on_hub(named) from error
            raise LoraUnavailable("the LoRA could not be downloaded from the hub") from error

    def _at_url(self, source: AtUrl) -> Path:
        """Kept by the hash of its address."""
        folder = self._settings.model_dir / FOLDER
        place = folder / f"{hashlib.sha256(source.url.encode()).hexdigest()[:32]}.safetensors"
        if place.is_file():
            return place
        if self._settings.local_only:
            raise _not_here()
        sources.fetch(source.url, place, self.max_bytes)
        _trim(folder, _FILES_KEPT * self.max_bytes, place)
        return place


def folder_of(settings: Settings) -> Path | None:
    """`LORA_DIR`, resolved; None: jobs may name nothing there.

    Raises:
        InvalidSettings: it is no folder.
    """
    if settings.lora_dir is None:
        return None
    folder = settings.lora_dir.expanduser().resolve()
    if not folder.is_dir():
        raise InvalidSettings(f"LORA_DIR={settings.lora_dir} is no folder of this machine")
    return folder


def _not_on_hub(named: bool) -> InvalidLora:
    if named:
        return InvalidLora("the hub has no such file, or not for this worker")
    return InvalidLora(
        "no public repo of the hub has such a file; one that is private or gated has to be named "
        "in this worker's LORA_SOURCES"
    )


def _not_here() -> InvalidLora:
    return InvalidLora("the LoRA is not on this machine, and LOCAL_ONLY=1 forbids downloads")


def _trim(folder: Path, max_bytes: int, newest: Path) -> None:
    """Removes what was downloaded first, as long as all of it is over the limit. Files of others
    stay: LORA_DIR may be the same folder.
    """
    try:
        ours = (path for path in folder.iterdir() if FETCHED.fullmatch(path.name))
        found = [(path.stat().st_mtime, path) for path in ours]
        left = sum(path.stat().st_size for _, path in found)
        for _, path in sorted(found):
            if left > max_bytes and path != newest:
                left -= path.stat().st_size
                path.unlink()
    except OSError as error:  # another worker that shares the folder does the same
        log.info("the folder of LoRAs was not tidied up: %s", error)
