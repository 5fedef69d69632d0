"""The files that `CHECKPOINT` and `TEXT_ENCODER_CHECKPOINT` name: here, on the hub, or at a URL."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx2
from tqdm import tqdm

from image_worker import checkpoints
from image_worker.catalog import HubFile
from image_worker.errors import ModelUnavailable
from image_worker.model import files
from image_worker.model.retrying import keep_trying
from image_worker.settings import Settings

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # of MODEL_DIR: what is here for these two alone
_TIMEOUT = 30.0  # seconds without a byte, after which the request is made again


def find_checkpoint(settings: Settings) -> Path:
    """The path of `CHECKPOINT`; what is not on this machine is downloaded.

    Raises:
        InvalidSettings: it names nothing.
        ModelUnavailable: it may not, or cannot, be downloaded.
    """
    return _find(checkpoints.parse(settings.checkpoint or ""), settings)


def find_text_encoder(settings: Settings) -> Path:
    """The same of `TEXT_ENCODER_CHECKPOINT`."""
    text = settings.text_encoder_checkpoint or ""
    return _find(checkpoints.parse(text, "TEXT_ENCODER_CHECKPOINT"), settings)


def _find(source: Path | HubFile | str, settings: Settings) -> Path:
    if isinstance(source, Path):
        return source
    if isinstance(source, HubFile):
        return files.find_adapter(source, settings, settings.model_dir / FOLDER)
    return _url(source, settings)


def checkpoint_here(settings: Settings) -> Path | None:
    """The path of `CHECKPOINT`, if it is on this machine.

    Raises:
        InvalidSettings: it names nothing.
    """
    return _here(find_checkpoint, settings)


def text_encoder_here(settings: Settings) -> Path | None:
    """The same of `TEXT_ENCODER_CHECKPOINT`."""
    return _here(find_text_encoder, settings)


def _here(find: Callable[[Settings], Path], settings: Settings) -> Path | None:
    try:
        return find(settings.model_copy(update={"local_only": True}))
    except ModelUnavailable:
        return None


def _url(url: str, settings: Settings) -> Path:
    """Kept by the hash of its address, since two may have the same name."""
    name = PurePosixPath(urlsplit(url).path).name or "checkpoint"
    folder = settings.model_dir / FOLDER / hashlib.sha256(url.encode()).hexdigest()[:16]
    place = folder / name
    if place.is_file():
        return place
    if settings.local_only:
        raise ModelUnavailable(f"{name} is not on this machine, and LOCAL_ONLY=1 forbids downloads")
    part = place.with_name(f"{name}.incomplete")

    def attempt() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _receive(url, part, name)

    def reached() -> int:
        return part.stat().st_size if part.is_file() else 0

    log.info("downloading %s to %s", name, folder)
    keep_trying(name, attempt, settings.download_timeout, threading.Event(), reached)
    part.replace(place)
    return place


def _receive(url: str, part: Path, name: str) -> None:
    """Goes on where an earlier attempt ended, if the server can."""
    with part.open("ab") as stream:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={stream.tell()}-"}
        client = httpx2.Client(follow_redirects=True, timeout=_TIMEOUT)
        with client, client.stream("GET", url, headers=headers) as response:
            if response.url.scheme != "https":
                raise ModelUnavailable(f"{name} is not sent over https")
            if response.status_code == 416:  # there is no more
                return
            if response.status_code >= 400:
                raise _refused(name, response.status_code)
            if response.status_code != 206:
                stream.truncate(0)
            left = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=left, desc=name, unit="B", unit_scale=True, disable=None) as bar:
                for chunk in response.iter_bytes():
                    bar.update(stream.write(chunk))
        stream.flush()
        os.fsync(stream.fileno())


def _refused(name: str, status: int) -> Exception:
    message = f"{name} could not be downloaded: its server answers HTTP {status}"
    if status in (408, 429) or status >= 500:
        return httpx2.ReadError(message)
    return ModelUnavailable(f"{message}; check its address")
