"""What is asked of the card, what came of it, and a job on its way between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from image_worker.edit.batching import Load
from image_worker.edit.conditions import Prepared
from image_worker.edit.denoise import Picture
from image_worker.loras import Style
from image_worker.model.adapters import Adapter
from image_worker.model.build import Model

Watcher = Callable[[int, int, "Tensor | None"], None]


@dataclass(frozen=True)
class Order:
    """What is asked of the card for one job: pictures of one size, one for each seed.

    style: its LoRAs; watcher(step, of, preview) is called on the engine's thread after each step;
    preview, where it is wanted, is (height, width, 3) uint8 on the CPU.
    """

    prepared: Prepared
    size: tuple[int, int]
    seeds: Sequence[int]
    steps: int
    cfg_scale: float
    style: Style | None = None
    watcher: Watcher | None = None
    previews: bool = False

    def adapter(self, model: Model) -> Adapter | None:
        """Its LoRAs on the card; on the engine's thread.

        Raises:
            InvalidLora, LoraUnavailable, OutOfMemory: as `Style.adapter`.
        """
        return self.style.adapter(model) if self.style else None


@dataclass(frozen=True)
class Made:
    """What came of an order.

    pixels: one per seed, (height, width, 3) uint8 on the CPU; seconds: by stage; together: pictures
    that were denoised at a time, on average over this job's steps.
    """

    pixels: list[Tensor]
    seconds: dict[str, float]
    together: float


@dataclass(eq=False)
class Task:
    """An order in the engine: how far it is, and who waits for it.

    moment: since when it has been in its present stage; pictures: once begun; company: how many
    pictures each of its steps had; tried_ahead: whether it was tried to begin it before its turn.
    """

    order: Order
    load: Load
    future: Future[Made]
    moment: float
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    company: list[int] = field(default_factory=list)
    tried_ahead: bool = False

    def passed(self, stage: str) -> None:
        """Notes the time since the last stage as that of `stage`."""
        now = time.perf_counter()
        self.seconds[stage], self.moment = now - self.moment, now

    @property
    def done(self) -> bool:
        """Whether no noise is left in any of its pictures."""
        return all(picture.done for picture in self.pictures)
