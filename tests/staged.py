"""An engine for tests: orders of the miniature, and steps that are taken when a test says so."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from image_worker import engine as engine_module
from image_worker.edit import conditions
from image_worker.engine import Engine
from image_worker.model.build import Model
from image_worker.model.remembered import Remembered
from image_worker.orders import Made, Order
from tests.conftest import make_picture, mini_model

SECONDS = 60


def model_of(dtype: torch.dtype = torch.float32) -> Model:
    return mini_model(dtype)


def order(
    seed: int = 0,
    steps: int = 3,
    size: tuple[int, int] = (128, 128),
    prompt: str = "make the red circle blue",
    *,
    dtype: torch.dtype = torch.float32,
    pictures: int = 1,
    references: int = 1,
    negative: str | None = None,
    **options: Any,
) -> Order:
    reference = conditions.as_reference(model_of(dtype), make_picture(seed=seed))
    prepared = conditions.prepare(model_of(dtype), prompt, negative, [reference] * references)
    seeds = [seed + number for number in range(pictures)]
    return Order(prepared, size, seeds, steps, 1.0, **options)


class Stage:
    """An engine whose steps are taken when the test says so.

    together: of each step, how many pictures took it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_size: int = 4, **plan: Any) -> None:
        model = model_of()
        self.model = dataclasses.replace(
            model,
            plan=dataclasses.replace(model.plan, **plan),
            encodings=Remembered(10**8),  # other tests' are of no use here
        )
        self.together: list[int] = []
        self._go, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        stock = engine_module.step

        def step(model: Model, pictures: Sequence[Any], limits: Any) -> list[int]:
            self._ready.release()
            assert self._go.acquire(timeout=SECONDS)
            self.together.append(len(pictures))
            return stock(model, pictures, limits)

        monkeypatch.setattr(engine_module, "step", step)
        self.engine = Engine(self.model, batch_size, patience=5.0)

    def reach_step(self) -> None:
        """Returns when the engine is about to take a step."""
        assert self._ready.acquire(timeout=SECONDS)

    def step(self, count: int = 1) -> None:
        """Lets a step that was reached happen, and waits for the next ones."""
        for number in range(count):
            if number:
                self.reach_step()
            self._go.release()

    def run_on(self) -> None:
        for _ in range(1000):
            self._go.release()


def pixels(future: Future[Made]) -> torch.Tensor:
    return future.result(SECONDS).pixels[0]


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal but for how float32 rounds in other company."""
    return bool((first.int() - second.int()).abs().max() <= 1)


def alone(given: Order, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    single = Engine(model_of(dtype), 1, patience=0.0)
    try:
        return pixels(single.submit(given))
    finally:
        single.close()


def tokens_of(given: Order) -> int:
    lengths = conditions.row_lengths(model_of(), given.prepared, given.size, 1)
    return max(length.total for length in lengths)
