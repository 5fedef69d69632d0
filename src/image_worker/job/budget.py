"""A limit to what many threads hold at a time, kept in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """So much at a time, in the order of asking. What is larger than all of it goes alone."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Waits until `amount` is there, and has it for as long as the context lasts."""
        amount, turn = min(amount, self._size), object()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(lambda: self._queue[0] is turn and amount <= self._left)
                self._left -= amount
            finally:
                self._queue.remove(turn)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()
