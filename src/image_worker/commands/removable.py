"""What of MODEL_DIR can be made again, by the names that this project gives it; and removing that.

Symbolic links are never followed: what is one, or behind one, stays. What can be downloaded again
is in `fetched.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from image_worker.errors import InvalidSettings
from image_worker.model import lease

Kind = Literal["prepared", "kernels", "downloads", "loras", "checkpoints"]
MANIFEST = "manifest.json"

_KEY = r"(?P<key>(?:[\w.-]+-)?[0-9a-f]{16}(?:-whole)?)"
_FOLDER = re.compile(_KEY)
_LEFTOVER = re.compile(rf"\.{_KEY}\.(?:[0-9a-f]{{32}}\.(?P<what>partial|damaged)|lease)")
_CLOCK = re.compile(r"\.[0-9a-f]{32}\.clock")
_KERNELS = ("triton", "cuda")
LINK = "it is a symbolic link"
_WRITTEN = "it is being written"


@dataclass(frozen=True)
class Item:
    """A file or folder that can be removed. size: bytes; age: seconds since it last changed.

    stays: why it is left alone all the same; None: nothing speaks against it.
    """

    kind: Kind
    path: Path
    size: int
    age: float
    about: str
    stays: str | None = None
    changed: float = 0.0


def checked(model_dir: Path) -> Path:
    """MODEL_DIR, without links.

    Raises:
        InvalidSettings: it is not there, no folder, or one that holds more than a worker's files.
    """
    folder = model_dir.resolve()
    if not folder.is_dir():
        raise InvalidSettings(f"MODEL_DIR={model_dir} is not a folder that exists")
    if Path.home().resolve().is_relative_to(folder):
        raise InvalidSettings(f"MODEL_DIR={model_dir} is / or holds a home folder: nothing is done")
    return folder


def made(folder: Path) -> list[Item]:
    """Prepared weights and compiled kernels in a MODEL_DIR that was checked."""
    return [*_prepared(folder / "prepared"), *_kernels(folder / "kernels")]


def made_of(folder: Path) -> tuple[str, str] | None:
    """Model and precision of prepared weights, by their manifest; None: it does not say."""
    try:
        facts = json.loads((folder / MANIFEST).read_bytes())["made_of"]
        return str(facts["model"]), str(facts["precision"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def measure(path: Path) -> tuple[int, float]:
    """Bytes, and the time of the last change, of a file or of all in a folder; links are not gone
    after. What vanishes meanwhile does not count.
    """
    size, newest = 0, 0.0
    with suppress(OSError):
        status = path.lstat()
        size, newest = 0 if path.is_dir() else status.st_size, status.st_mtime
    if path.is_symlink() or not path.is_dir():
        return size, newest
    for parent, folders, names in os.walk(path):
        for name in (*folders, *names):
            with suppress(OSError):
                status = (Path(parent) / name).lstat()
                newest = max(newest, status.st_mtime)
                size += status.st_size if name in names else 0
    return size, newest


def remove(item: Item) -> tuple[int, str | None]:
    """Bytes that are free now, and why not all of them are."""
    path = item.path
    if path.is_symlink() or path.parent.resolve() != path.parent:
        return 0, LINK
    before, changed = measure(path)
    if changed > item.changed:
        return 0, "it has changed since it was listed"
    if item.kind == "prepared" and _is_in_use(path, _now(path.parent), changed):
        return 0, _WRITTEN
    if item.kind == "prepared" and path.is_dir() and not path.name.startswith("."):
        # At once for everybody else: no start finds a half of it.
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.damaged")
        try:
            path = path.rename(aside)
        except OSError as error:
            return 0, _why(error)
    try:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return 0, _why(error)
    if not os.path.lexists(path):
        return before, None
    left, _ = measure(path)
    return before - left, "not all of it could be removed"


def _why(error: OSError) -> str | None:
    """None: it is gone, which is what was wanted."""
    return None if isinstance(error, FileNotFoundError) else str(error.strerror or error)


def _prepared(home: Path) -> Iterator[Item]:
    if home.is_symlink():
        yield Item("prepared", home, 0, 0.0, "prepared weights", LINK)
        return
    paths = sorted(path for path in children(home) if _about(path) is not None)
    now = _now(home) if paths else 0.0
    for path in paths:
        size, changed = measure(path)
        stays = LINK if path.is_symlink() else None
        if stays is None and _is_in_use(path, now, changed):
            stays = _WRITTEN
        about = _about(path) or "vanished"
        yield Item("prepared", path, size, now - changed, about, stays, changed)


def _about(path: Path) -> str | None:
    """What something beside prepared weights, or a folder of them, is; None: not ours."""
    if _CLOCK.fullmatch(path.name):
        return "a probe of the clock"
    if found := _LEFTOVER.fullmatch(path.name):
        names = {"partial": "half written", "damaged": "half removed"}
        return names.get(found["what"], "a writer's mark")
    if _FOLDER.fullmatch(path.name) and path.is_dir():
        return ", ".join(made_of(path) or ("without a manifest",))
    return None


def _is_in_use(path: Path, now: float, changed: float) -> bool:
    """Whether somebody is writing it, or the folder that it belongs to, and was alive lately."""
    if path.name.startswith(".") and now - changed < lease.SECONDS:
        return True
    found = _LEFTOVER.fullmatch(path.name) or _FOLDER.fullmatch(path.name)
    if found is None:
        return False
    try:
        renewed = path.with_name(f".{found['key']}.lease").lstat().st_mtime
    except OSError:
        return False
    return now - renewed < lease.SECONDS


def _kernels(home: Path) -> Iterator[Item]:
    if home.is_symlink():
        yield Item("kernels", home, 0, 0.0, "compiled kernels", LINK)
        return
    for name in _KERNELS:
        path = home / name
        if path.is_symlink():
            yield Item("kernels", path, 0, 0.0, "compiled kernels", LINK)
        elif path.is_dir():
            size, changed = measure(path)
            age = time.time() - changed
            yield Item("kernels", path, size, age, "compiled kernels", None, changed)


def children(folder: Path) -> list[Path]:
    """What is in a folder; nothing, if there is none."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _now(folder: Path) -> float:
    """By the clock of the volume; by ours where it cannot be written."""
    try:
        return lease.now(folder)
    except OSError:
        return time.time()
