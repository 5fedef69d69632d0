"""The facts of a cold start, logged while it goes on and told in the first reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One step of the cold start."""

    name: str
    seconds: float


@dataclass
class ColdStart:
    """What the cold start took: its steps, and peak memory in GiB once it was over.

    prepared: whether prepared weights are there for the next start.
    """

    steps: list[Step] = field(default_factory=list)
    prepared: bool = False
    peak_vram_gib: float | None = None
    peak_host_gib: float | None = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times and logs one step."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(Step(name, round(time.perf_counter() - start, 3)))
        log.info("cold start: %s in %.2f s; %s", name, self.steps[-1].seconds, _memory_line())

    def finish(self) -> None:
        """Notes the peaks."""
        self.peak_host_gib = round(host_peak_gib(), 2)
        if torch.cuda.is_available():
            self.peak_vram_gib = round(torch.cuda.max_memory_reserved() / _GIB, 2)


def host_peak_gib() -> float:
    """The most memory that this process had; not its parent's, which getrusage counts in."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20  # KiB
    return 0.0


def _memory_line() -> str:
    line = f"host peak {host_peak_gib():.1f} GiB"
    if torch.cuda.is_available():
        line += f", card {torch.cuda.memory_allocated() / _GIB:.1f} GiB"
    return line
