"""What of MODEL_DIR can be fetched again: downloads that were cut off, files that CHECKPOINT or
TEXT_ENCODER_CHECKPOINT named, and LoRAs that jobs named.

Found by the names that this project gives them. Whole files of models lie in a cache that other
programs may share, and are not looked at; links are never followed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from image_worker.commands.removable import LINK, Item, Kind, children, measure

_HASH = re.compile(r"[0-9a-f]{16}")  # of a checkpoint's URL
_PART = ".incomplete"
_HELD = ("blobs", "snapshots")  # folders of a hub's cache with files; in the latter, mostly links


@dataclass(frozen=True)
class InUse:
    """What stays in any case: files that variables name, and what lies in LORA_DIR.

    Paths are without links. named: the variable that names a file; lora_dir: None if there is none.
    """

    named: Mapping[Path, str] = field(default_factory=dict)
    lora_dir: Path | None = None

    def why(self, path: Path) -> str | None:
        """Why a file stays; None: it need not."""
        if path in self.named:
            return f"{self.named[path]} names it"
        return "it is in LORA_DIR" if path.parent == self.lora_dir else None


def fetched(folder: Path, silence: float, in_use: InUse) -> list[Item]:
    """Everything of these kinds in a MODEL_DIR that was checked.

    silence: seconds without a byte, after which a download counts as dead.
    """
    found = [
        *_models(folder),
        *_checkpoints(folder / "checkpoints"),
        *_loras(folder / "loras"),
    ]
    return [replace(item, stays=item.stays or _why(item, silence, in_use)) for item in found]


def _why(item: Item, silence: float, in_use: InUse) -> str | None:
    if item.kind == "downloads" and item.age < silence:
        return "it may be arriving"
    return in_use.why(item.path)


def _models(folder: Path) -> Iterator[Item]:
    """Of them, what was cut off."""
    for repo in sorted(folder.glob("models--*")):
        for place in (repo, repo / "blobs"):
            if place.is_symlink():
                yield _link("downloads", place)
                break
        else:
            yield from _files("downloads", (repo / "blobs").glob(f"*{_PART}"), _repo(repo))


def _checkpoints(home: Path) -> Iterator[Item]:
    if home.is_symlink():
        yield _link("checkpoints", home)
        return
    yield from _cache("checkpoints", home)
    for place in sorted(children(home)):
        if _HASH.fullmatch(place.name) and not place.is_symlink():
            yield from _files("checkpoints", children(place), "a checkpoint")


def _loras(home: Path) -> Iterator[Item]:
    from image_worker.job.loras import PART
    from image_worker.lora_files import FETCHED, WITH_TOKEN, WITHOUT_TOKEN

    if home.is_symlink():
        yield _link("loras", home)
        return
    ours = [path for path in children(home) if FETCHED.fullmatch(path.name)]
    yield from _files("loras", [*ours, *home.glob("*".join(PART))], "a LoRA from a URL")
    for name in (WITHOUT_TOKEN, WITH_TOKEN):
        if (home / name).is_symlink():
            yield _link("loras", home / name)
        else:
            yield from _cache("loras", home / name)


def _cache(kind: Kind, home: Path) -> Iterator[Item]:
    """A hub's cache of our own, file by file, whichever revisions have them."""
    for repo in sorted(home.glob("models--*")):
        paths = [
            Path(parent) / name
            for held in _HELD
            if not (repo.is_symlink() or (repo / held).is_symlink())
            for parent, _, names in os.walk(repo / held)
            for name in names
        ]
        names = {path.readlink().name: path.name for path in paths if path.is_symlink()}
        for path in (path for path in paths if not path.is_symlink()):
            yield from _files(kind, [path], f"{_repo(repo)}: {names.get(path.name, path.name)}")


def _files(kind: Kind, paths: Iterable[Path], about: str) -> Iterator[Item]:
    """Whole files are of that kind; those that were cut off are downloads."""
    for path in sorted(paths):
        size, changed = measure(path)
        found: Kind = "downloads" if path.name.endswith(_PART) else kind
        if path.is_symlink():
            yield _link(found, path)
        elif path.is_file():
            yield Item(found, path, size, time.time() - changed, about, None, changed)


def _link(kind: Kind, path: Path) -> Item:
    return Item(kind, path, 0, 0.0, "not looked at", LINK)


def _repo(folder: Path) -> str:
    return folder.name.removeprefix("models--").replace("--", "/")
