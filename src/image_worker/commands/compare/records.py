"""What was measured, a line of JSON each: added to as it happens, so that nothing is lost."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """The lines of a file. `key` says of what a record is: way, settings, job, code and machine."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Reads what is there; fresh: forgets it. A line that was cut off is passed over."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a") as stream:
                stream.write("\n")
        self._records = [found for line in text.splitlines() if (found := _parsed(line))]

    def add(self, kind: str, key: str, **facts: Any) -> None:
        """Keeps a record, on the disk, too."""
        record = {"kind": kind, "key": key, **facts}
        with self._path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self._records.append(record)

    def all(self, kind: str, key: str) -> list[Record]:
        """Those of a kind, the first one first."""
        return [one for one in self._records if one["kind"] == kind and one["key"] == key]

    def first(self, kind: str, key: str) -> Record | None:
        """The first of a kind."""
        return next(iter(self.all(kind, key)), None)

    def error(self, key: str) -> Record | None:
        """What went wrong, if that was the last of it."""
        last = next((one for one in reversed(self._records) if one["key"] == key), None)
        return last if last is not None and last["kind"] == "error" else None

    def run(self, key: str, seed: int, repetition: int) -> Record | None:
        """A run of a seed; repetition: which one, from 0."""
        for one in self.all("run", key):
            if (one["seed"], one["repetition"]) == (seed, repetition):
                return one
        return None


def key_of(facts: Mapping[str, Any]) -> str:
    """One name for the same facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, text: str) -> None:
    """A file that is there as a whole, as it was or as it shall be, whoever is interrupted."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _parsed(line: str) -> Record | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"kind", "key"} <= found.keys() else None
