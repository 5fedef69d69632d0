"""Waiting, for so long and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 60


def eventually(true: Callable[[], object]) -> None:
    """Returns as soon as it is."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"not within {SECONDS} seconds"
        time.sleep(0.02)
