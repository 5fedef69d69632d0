"""Prepared checkpoints: weights as they are served, written once and read at the disk's speed.

`MODEL_DIR/prepared/<key>/` holds safetensors files, one for each block and one for the rest of each
component, and a manifest with their checksums. The key stands for everything that shapes the bytes.
A folder appears whole or not at all: it is written under another name, and renamed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model import lease, tensor_file
from image_worker.model.lease import Lease
from image_worker.model.packed import Layout, Slot
from image_worker.model.tensor_file import TensorFile

log = logging.getLogger(__name__)

CODE = 6  # to be raised whenever other bytes come of the same files
CHUNK = 2**25  # bytes that share a checksum
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Unit:
    """What a file is to hold. pack: copies it to memory of its layout's size, to be written."""

    layout: Layout
    pack: Callable[[Tensor], None]

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> Unit:
        """What these hold now."""
        layout = Layout.of(slots)
        return cls(layout, functools.partial(layout.pack, slots))


@dataclass(frozen=True)
class FileFacts:
    """A file's checksums (XXH3, 128 bits): of its header, then of each chunk."""

    sums: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A folder that was written whole, and what its manifest says of its files.

    chunk: bytes that share a checksum.
    """

    folder: Path
    files: Mapping[str, FileFacts]
    chunk: int

    @classmethod
    def find(cls, folder: Path) -> Prepared | None:
        """None: there is no such folder.

        Raises:
            ModelMismatch: it is damaged.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            files = {
                name: FileFacts(tuple(entry["sums"])) for name, entry in manifest["files"].items()
            }
            chunk = int(manifest["chunk"])
            if chunk <= 0:
                raise ValueError("no size of chunks")
        except FileNotFoundError:
            if folder.exists():
                raise ModelMismatch(f"{folder.name}/{MANIFEST} is missing") from None
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelMismatch(f"{folder.name}/{MANIFEST} is damaged") from error
        return cls(folder, files, chunk)

    def open(self, name: str) -> TensorFile:
        """A file's header, checked.

        Raises:
            ModelMismatch: the file is missing, cut off or damaged; says which.
        """
        facts = self.files.get(name)
        path = self.folder / name
        try:
            found = TensorFile.open(path)
            with path.open("rb") as stream:
                head = digest(stream.read(found.start))
        except FileNotFoundError as error:
            raise ModelMismatch(f"{name} is missing") from error
        except OSError as error:
            raise ModelMismatch(f"{name} cannot be read: {error}") from error
        chunks = -(-found.layout.size // self.chunk)
        if facts is None or len(facts.sums) != 1 + chunks or facts.sums[0] != head:
            raise ModelMismatch(f"{name} is not what was written")
        return found


def discard(folder: Path) -> None:
    """Takes a folder away, at once for everybody else. Where that cannot be, it stays."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.damaged")
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("%s could not be removed: %s", folder, error)
    shutil.rmtree(aside, ignore_errors=True)


def key(facts: Mapping[str, Any]) -> str:
    """What a folder of these facts is called: some of them, to be read, and a hash of all."""
    text = json.dumps({"code": CODE, **facts}, sort_keys=True)
    short = hashlib.sha256(text.encode()).hexdigest()[:16]
    return "-".join(
        [*(str(facts[name]) for name in ("model", "precision") if name in facts), short]
    )


def digest(data: Any) -> str:
    """The checksum of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def write(folder: Path, units: Mapping[str, Unit], made_of: Mapping[str, Any]) -> bool:
    """Writes a prepared checkpoint, unless another process is at it; one unit at a time.

    units: what each file holds, by its name without ending. Returns whether it is there now.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = Lease(folder.with_name(f".{folder.name}.lease"))
    if not held.take():
        log.info("another worker is writing %s", folder.name)
        return False
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        if (folder / MANIFEST).exists():  # written while we loaded
            return True
        _remove_leftovers(folder.parent)
        for name in units:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
        total = sum(unit.layout.size for unit in units.values())
        _check_room(folder.parent, total)
        files = {}
        with tqdm(total=total, desc="prepare", unit="B", unit_scale=True, disable=None) as bar:
            for name, unit in units.items():
                files[f"{name}.safetensors"] = _write_file(partial, name, unit, held, CHUNK)
                bar.update(unit.layout.size)
        manifest = {"code": CODE, "chunk": CHUNK, "made_of": made_of, "files": files}
        _write_json(partial / MANIFEST, manifest)
        for part in {partial, *(path.parent for path in partial.rglob("*"))}:
            _sync(part)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST).exists():  # otherwise somebody was faster
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        held.release()
    return True


def add(folder: Path, name: str, unit: Unit) -> None:
    """Adds a file to a folder that was written whole, unless another process is at it.

    Who reads the folder meanwhile finds it without the file, or with all of it.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    held = Lease(folder.with_name(f".{folder.name}.lease"))
    if not held.take():
        return
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    file = f"{name}.safetensors"
    try:
        (partial / name).parent.mkdir(parents=True)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entry = _write_file(partial, name, unit, held, manifest["chunk"])
        manifest["files"][file] = entry
        _write_json(partial / MANIFEST, manifest)
        (partial / file).replace(folder / file)
        _sync((folder / file).parent)
        (partial / MANIFEST).replace(folder / MANIFEST)  # last, since it promises the file
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        held.release()


def _write_file(partial: Path, name: str, unit: Unit, held: Lease, chunk: int) -> dict[str, Any]:
    path = partial / f"{name}.safetensors"
    layout = unit.layout
    memory = torch.zeros(layout.size, dtype=torch.uint8)
    unit.pack(memory)
    view, head = tensor_file.bytes_of(memory), tensor_file.header(layout)
    sums = [digest(head)]
    with path.open("wb") as stream:
        stream.write(head)
        for start in range(0, layout.size, chunk):
            held.renew()
            piece = view[start : start + chunk]
            sums.append(digest(piece))
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return {"sums": sums}


def _write_json(path: Path, content: Any) -> None:
    with path.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Names that were given in a folder outlive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{needed / 2**30:.1f} GiB are needed in {folder}, and {free / 2**30:.1f} are free"
        )


def _remove_leftovers(folder: Path) -> None:
    """Of writers that were killed, of whatever key."""
    now = lease.now(folder)
    for probe in folder.glob(".*.clock"):
        probe.unlink(missing_ok=True)
    for left in (*folder.glob(".*.partial"), *folder.glob(".*.damaged")):
        times = []
        for path in (left, *left.rglob("*")):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
        if times and now - max(times) >= lease.SECONDS:
            shutil.rmtree(left, ignore_errors=True)
