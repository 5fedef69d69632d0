"""Stands in for the processes of `compare`: answers at once, with pictures that tell ways apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from image_worker.commands.compare.process import WayFailed
from image_worker.commands.compare.records import Records
from image_worker.commands.compare.trial import Trial
from image_worker.commands.compare.ways import parse

MACHINE = {
    "card": None,
    "processor": "a <fast> one",
    "threads": 1,
    "host_memory": 2**34,
    "system": "Linux",
    "versions": {"python": "3", "torch": "2"},
}
CARD = {"name": "a card", "memory": 2**34, "capability": "9.0", "driver": None}
SHAPE = {"heads": 2, "size": 32, "text_tokens": 8, "image_tokens": 64}
BUSY = {"name": "others", "ms": 10.0, "count": 2}
Answer = Callable[[Mapping[str, str], Mapping[str, Any]], dict[str, Any] | None]


class Stubs:
    """What `measure` starts processes with. answer: for (variables, order); None: as usual."""

    def __init__(self, answer: Answer = lambda variables, order: None) -> None:
        self.answer, self.orders = answer, []
        self.alive: list[StubProcess] = []
        self.most = 0

    def __call__(self, variables: Mapping[str, str], log: Path) -> StubProcess:
        process = StubProcess(self, variables)
        self.alive.append(process)
        self.most = max(self.most, len(self.alive))
        return process

    def runs(self) -> list[str]:
        """Whose runs there were, in order; first jobs apart."""
        return [name for name, what, has_picture in self.orders if what == "edit" and has_picture]


class StubProcess:
    """One of them."""

    def __init__(self, stubs: Stubs, variables: Mapping[str, str]) -> None:
        self._stubs, self._variables = stubs, variables
        self.begun = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self in self._stubs.alive:
            self._stubs.alive.remove(self)

    def ask(self, **order: Any) -> dict[str, Any]:
        name = "-".join(self._variables.values())
        self._stubs.orders.append((name, order["do"], bool(order.get("picture"))))
        given = self._stubs.answer(self._variables, order)
        if given is not None:
            if "error" in given:
                raise WayFailed(given["error"]["type"], given["error"]["message"])
            return given
        if order["do"] == "card_time":
            return {"parts": [{"name": "products", "ms": 30.0, "count": 9}, BUSY]}
        return self._started() if order["do"] == "start" else self._edited(order, name)

    def _started(self) -> dict[str, Any]:
        steps = [{"name": "load <vae>", "seconds": 0.5}]
        facts = {"seconds": 2.5, "steps": steps, "plan": "everything", "weights": "4bit"}
        return {**facts, "model": "mini", "confined": False, "shape": SHAPE, **self._memory()}

    def _edited(self, order: Mapping[str, Any], name: str) -> dict[str, Any]:
        seed = order["input"]["seed"]
        if order["picture"]:
            noise = np.random.default_rng(seed).integers(0, 200, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise + len(name)).save(order["picture"])
        facts = {"seconds": 1 + seed / 10, "timings": {"denoise": 0.8}, "steps": 2}
        return {**facts, "width": 32, "height": 32, "warnings": [], **self._memory()}

    def _memory(self) -> dict[str, int | None]:
        return {"card": None, "card_free": None, "host": 2**20}


class Watched:
    """Is told how it goes on, and counts. interrupt: after so many rounds, as Ctrl-C does."""

    def __init__(self, interrupt: int | None = None) -> None:
        self.jobs, self.rounds, self._interrupt = 0, 0, interrupt

    def begins(self, what: str) -> None:
        pass

    def done(self, jobs: int) -> None:
        self.jobs += jobs

    def round(self) -> None:
        self.rounds += 1
        if self.rounds == self._interrupt:
            raise KeyboardInterrupt


def trial(out: Path, *ways: str, seeds: tuple[int, ...] = (1, 2, 3, 4, 5), **changes: Any) -> Trial:
    """A trial of these ways in a folder, as a new process would see it."""
    facts: dict[str, Any] = {
        "ways": tuple(parse(ways, changes.pop("loras", ()))),
        "job": {"prompt": "make it blue", "output_format": "png"},
        "seeds": seeds,
        "out": out,
        "records": Records(out / "results.jsonl"),
        "machine": MACHINE,
        "code": "c0de",
    }
    return Trial(**facts | changes)
