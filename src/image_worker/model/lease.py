"""Who writes to a folder that several processes share, perhaps on several machines."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

SECONDS = 60.0  # after which a writer that gave no sign of life counts as dead


class Lease:
    """A file that says: somebody is at it, and was alive lately.

    It spares work done twice and guards nothing else: folders appear whole whoever writes them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self) -> bool:
        """Whether it is ours now: nobody had it, or its holder gave no sign for a minute."""
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if self._age() < SECONDS:
                return False
            self.renew()
        return True

    def renew(self) -> None:
        """A sign of life."""
        self._path.touch()

    def release(self) -> None:
        """Lets the next one have it."""
        self._path.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the last sign."""
        try:
            return now(self._path.parent) - self._path.stat().st_mtime
        except FileNotFoundError:  # released meanwhile
            return SECONDS


def now(folder: Path) -> float:
    """By the clock of the volume, which need not be ours."""
    probe = folder / f".{uuid.uuid4().hex}.clock"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
