"""How far a job is, and how long it will still take."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """Steps done, of how many; 0 of 0 before the first."""

    def __init__(self) -> None:
        self.step = self.of = 0
        self._first: tuple[int, float] | None = None
        self._last = 0.0

    def told(self, step: int, of: int) -> None:
        """A step was done just now."""
        self.step, self.of, self._last = step, of, time.monotonic()
        self._first = self._first or (step, self._last)

    @property
    def seconds_left(self) -> float | None:
        """By the pace since the first step; None before the second."""
        if self._first is None or self.step == self._first[0]:
            return None
        step, moment = self._first
        return (self.of - self.step) * (self._last - moment) / (self.step - step)

    def view(self) -> dict[str, Any]:
        """As callers see it."""
        left = self.seconds_left
        seen: dict[str, Any] = {"step": self.step, "of": self.of}
        return seen if left is None else seen | {"seconds_left": round(left, 2)}
