"""What was used last, up to a number of bytes; and whatever is in use, for all who ask for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar
from weakref import WeakValueDictionary


class Sized(Protocol):
    """What knows how many bytes it takes."""

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        ...


T = TypeVar("T", bound=Sized)


class Kept(Generic[T]):
    """Values by their keys. What is over the limit goes, used longest ago first: its memory is free
    as soon as nobody uses it. May be used from any thread.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of what is kept unused; 0 keeps only what is in use."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._recent: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._used: WeakValueDictionary[Hashable, T] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The value, if it is kept or in use."""
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
            return self._used.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Keeps the value, unless it alone is over the limit."""
        size = value.nbytes
        with self._lock:
            self._used[key] = value
            if key in self._recent:
                self._bytes -= self._recent.pop(key)[1]
            if size > self._max_bytes:
                return
            self._recent[key] = value, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._recent.popitem(last=False)[1][1]

    def clear(self) -> bool:
        """Keeps nothing of what there is. Returns whether there was anything."""
        with self._lock:
            had = bool(self._recent)
            self._recent.clear()
            self._bytes = 0
            return had
