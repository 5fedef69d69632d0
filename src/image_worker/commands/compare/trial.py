"""A trial: what is measured of which ways, and what of it is there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from image_worker.commands.compare.records import Records, key_of
from image_worker.commands.compare.ways import Way, settings_of
from image_worker.errors import InvalidSettings

LEAST_RUNS = 5


@dataclass(frozen=True)
class Trial:
    """job: its input without a seed; seeds: one for each run; machine, code: where, and of what."""

    ways: tuple[Way, ...]
    job: Mapping[str, Any]
    seeds: tuple[int, ...]
    out: Path
    records: Records
    machine: Mapping[str, Any]
    code: str

    def key(self, way: Way) -> str:
        """Of a way's records."""
        return self._keys[way]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Each run's seed, and which run of this seed it is, from 0."""
        counts: dict[int, int] = {}
        for seed in self.seeds:
            yield seed, counts.setdefault(seed, 0)
            counts[seed] += 1

    def pending(self, way: Way) -> set[tuple[int, int]]:
        """The runs that there is no record of."""
        key = self.key(way)
        return {run for run in self.runs() if self.records.run(key, *run) is None}

    def unwatched(self, way: Way) -> bool:
        """Whether it is still to be looked at where the card's time goes."""
        on_card = self.machine["card"] is not None
        return on_card and self.records.first("card_time", self.key(way)) is None

    def unfinished(self, way: Way) -> bool:
        """Whether anything is to be measured of it."""
        return bool(self.pending(way)) or self.unwatched(way)

    def picture(self, way: Way, seed: int) -> Path:
        """Where a picture is, or shall be."""
        return self.out / "pictures" / f"{self.key(way)}-{seed}.png"

    def log(self, way: Way) -> Path:
        """What the way's process logs."""
        return self.out / "logs" / f"{self.key(way)}.log"

    def shape(self) -> dict[str, int] | None:
        """Of the transformer's tensors in this job; None: no way has told it."""
        for way in self.ways:
            started = self.records.first("start", self.key(way))
            if started is not None:
                shape: dict[str, int] = started["shape"]
                return shape
        return None

    def kernels_key(self) -> str | None:
        """Of the kernels' record: by code, machine and shape; None: the shape is not known."""
        shape = self.shape()
        if shape is None:
            return None
        return key_of({"code": self.code, "machine": self.machine, "shape": shape})

    @cached_property
    def _keys(self) -> dict[Way, str]:
        job = hashlib.sha256(json.dumps(dict(self.job), sort_keys=True).encode()).hexdigest()
        shared = {"job": job, "machine": self.machine, "code": self.code}
        return {way: key_of(shared | _identity(way)) for way in self.ways}


def seeds_of(runs: int | None, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """A seed for each run: those given, again and again; 1, 2, … if none are.

    Raises:
        InvalidSettings: there are fewer runs than tell anything, or than seeds.
    """
    count = max(LEAST_RUNS, len(seeds or ())) if runs is None else runs
    if count < LEAST_RUNS:
        raise InvalidSettings(
            f"--runs {count}: at least {LEAST_RUNS} are needed; the range of so few runs leaves "
            "out the true median too often for anybody to choose by"
        )
    if seeds and len(seeds) > count:
        raise InvalidSettings(f"--runs {count} leaves some of the {len(seeds)} --seeds without one")
    chosen = list(dict.fromkeys(seeds)) if seeds else list(range(1, count + 1))
    return tuple(chosen[number % len(chosen)] for number in range(count))


_FILES = ("CHECKPOINT", "TEXT_ENCODER_CHECKPOINT", "SVDQ_RANGES")


def _identity(way: Way) -> dict[str, Any]:
    """What makes its figures what they are. Of files also their sizes and dates."""
    try:
        settings = settings_of(way)
    except InvalidSettings as error:
        settings = {"refused": str(error)}
    named = (settings.get(name, "") for name in _FILES)
    files = [*way.loras, *named]
    return {
        "variables": way.variables,
        "settings": settings,
        "files": [_of_file(Path(name)) for name in files if name],
    }


def _of_file(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), status.st_size, status.st_mtime_ns
