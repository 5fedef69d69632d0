"""Encodings of prompts and pictures, kept for the next job that has the same ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class Remembered:
    """Tensors by what they were made from, those used last, in the host's memory.

    A key must say all that decides the values. Only one thread at a time may use it.
    """

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of all tensors together; 0 remembers nothing."""
        self.hits = self.misses = 0
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `make` gave for this key, on `device`: remembered, or made now."""
        if key in self._tensors:
            self.hits += 1
            self._tensors.move_to_end(key)
            return self._tensors[key].to(device, copy=True)
        self.misses += 1
        made = make()
        self._keep(key, made)
        return made

    def _keep(self, key: bytes, made: Tensor) -> None:
        if made.nbytes > self._max_bytes:
            return
        # A copy of its own, on the CPU, too: a view would keep all of what it is a part of.
        self._tensors[key] = made.to("cpu", copy=True)
        self._bytes += made.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
