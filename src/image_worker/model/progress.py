"""How far downloads are: a bar in a terminal, lines in a log elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Bytes of several files, told together. Threads may report at the same time."""

    def __init__(self, name: str, sizes: Mapping[str, int], there: Mapping[str, int]) -> None:
        """sizes: bytes of each file; there: how many of them there are already."""
        self._name = name
        self._total, self._positions = sum(sizes.values()), dict(there)
        self._lock = threading.Lock()
        self._told_at, self._told = time.monotonic(), self.done
        self._bar = tqdm(
            total=self._total,
            initial=self.done,
            desc=name,
            unit="B",
            unit_scale=True,
            disable=None,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def done(self) -> int:
        """Bytes that are there."""
        return sum(self._positions.values())

    def at(self, file: str, position: int) -> None:
        """`file` has so many bytes by now; fewer than before, if it was begun anew."""
        with self._lock:
            self._bar.update(position - self._positions[file])
            self._positions[file] = position

    def tell(self) -> None:
        """Logs how much there is and how fast it came since the last time; not beside a bar."""
        if not self._bar.disable:
            return
        now, done = time.monotonic(), self.done
        rate = (done - self._told) / max(now - self._told_at, 1e-3)
        self._told_at, self._told = now, done
        log.info(
            "%s: %.2f of %.2f GB, %.2f GB/s", self._name, done / 1e9, self._total / 1e9, rate / 1e9
        )
