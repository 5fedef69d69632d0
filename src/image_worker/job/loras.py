"""LoRAs that callers name: which forms a name has, and fetching what is behind a URL.

What comes from there is untrusted: it is fetched from public addresses only, over https, with a
limit to its bytes and a deadline. What is in it is checked when it is read (`model/lora.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from requests import Response

from image_worker.catalog import CATALOG, HubFile
from image_worker.checkpoints import published
from image_worker.errors import InvalidLora, LoraUnavailable
from image_worker.job.network import Wanted, within

FETCH_SECONDS = 120.0
_SUFFIX = ".safetensors"
_SECURE = ("https://",)
_LORA = Wanted("the LoRA", InvalidLora, LoraUnavailable, _SECURE)
_READ = 2**20
PART = ("fetching-", ".incomplete")  # what a file's name begins and ends with while it arrives
_LIGHTNING = {file.repo.lower() for entry in CATALOG.values() for file in entry.lightning.values()}
_LONGEST_NAME = 200  # characters

# No part of a path begins with a dot, so none leads out of its folder.
_PART = r"\w[\w .+()-]*"
_FILE = rf"{_PART}(?<=\.safetensors)"
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ON_HUB = re.compile(
    rf"(?P<repo>{_REPO}):(?P<path>(?:{_PART}/)*{_FILE})(?:@(?P<revision>\w[\w.+-]*(?:/\w[\w.+-]*)*))?"
)
_IN_FOLDER = re.compile(_FILE)


@dataclass(frozen=True)
class OnHub:
    """A file of a repo on the hub; revision None: the newest that this machine knows."""

    repo: str
    path: str
    revision: str | None

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class AtUrl:
    """A file behind an https URL."""

    url: str

    @property
    def name(self) -> str:
        """Of the file."""
        return unquote(PurePosixPath(urlsplit(self.url).path).name)[-_LONGEST_NAME:]


@dataclass(frozen=True)
class InFolder:
    """A file of the worker's own folder."""

    name: str


Source = OnHub | AtUrl | InFolder


def parse(text: str) -> Source:
    """What a job names.

    Raises:
        ValueError: none of the forms that there are; says which there are.
    """
    if text.lower().startswith(_SECURE):
        if not urlsplit(text).path.lower().endswith(_SUFFIX):
            raise ValueError(f"the path of a LoRA's URL must end in {_SUFFIX}")
        return AtUrl(text)
    on_hub = _ON_HUB.fullmatch(text)
    if on_hub and published(HubFile(on_hub["repo"], on_hub["path"])):
        raise ValueError("this file is a whole transformer, which no job chooses, and no LoRA")
    if on_hub and on_hub["repo"].lower() in _LIGHTNING:
        raise ValueError(
            "Lightning needs a schedule of its own: the worker's settings choose it, not a job"
        )
    if on_hub:
        return OnHub(on_hub["repo"], on_hub["path"], on_hub["revision"])
    if _IN_FOLDER.fullmatch(text):
        return InFolder(text)
    raise ValueError(
        "a LoRA is owner/name:file.safetensors or owner/name:file.safetensors@revision on the hub, "
        "an https URL of a .safetensors file, or the name of one in the worker's folder"
    )


def fetch(url: str, place: Path, max_bytes: int, seconds: float = FETCH_SECONDS) -> None:
    """Writes what is behind `url` to `place`, whole or not at all.

    Raises:
        LoraUnavailable: not answering, busy, too slow, or no room for it here.
        InvalidLora: refused, not found or too large.
    """
    late = LoraUnavailable(f"the LoRA did not arrive within {seconds:g} seconds")
    deadline = time.monotonic() + seconds
    within(seconds, lambda: _download(url, place, max_bytes, deadline), late)


def _download(url: str, place: Path, max_bytes: int, deadline: float) -> None:
    def receive(response: Response) -> None:
        _LORA.check(response, max_bytes, str(too_large(max_bytes)))
        _write(response, place, max_bytes, deadline)

    _LORA.fetch(url, receive)


def _write(response: Response, place: Path, max_bytes: int, deadline: float) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    before, after = PART
    handle, part = tempfile.mkstemp(dir=place.parent, prefix=before, suffix=after)
    try:
        with os.fdopen(handle, "wb") as stream:
            # read1 returns after one read of the socket, so a slow drip meets the deadline.
            while chunk := response.raw.read1(_READ, decode_content=True):
                stream.write(chunk)
                if stream.tell() > max_bytes:
                    raise too_large(max_bytes)
                if time.monotonic() > deadline:
                    raise LoraUnavailable("the LoRA's server is too slow")
        Path(part).replace(place)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(part).unlink()
        raise


def too_large(max_bytes: int) -> InvalidLora:
    """The error of a file over the limit."""
    return InvalidLora(f"the LoRA is over {max_bytes // 10**6} MB, the limit of this worker")
