"""A training step as one CUDA graph: those of so small a model are shorter than their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3


class Graph:
    """`step` captured once and then replayed. What it reads and writes must stay where it is.

    The steps that warm it up are done for real, before it is captured. Without a card, every step
    is simply taken.
    """

    def __init__(self, step: Callable[[], Tensor], pool: Any = None) -> None:
        self._step = step  # and with it all that it reads
        self._graph: Any = None
        if torch.cuda.is_available():
            self._capture(pool)

    def _capture(self, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = self._step()

    @property
    def pool(self) -> Any:
        """Its memory, which a graph that never runs at the same time can share."""
        return self._graph.pool() if self._graph else None

    def __call__(self) -> Tensor:
        """Runs the step; the result is overwritten by the next."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._result
