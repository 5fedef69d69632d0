"""The one thread that uses the card: it takes jobs from a queue, several at a time, to pictures.

Batching is continuous: a job joins the others between two of their denoising steps and leaves when
its own are done, so nobody waits for a batch to fill or to end. Only where weights pass through the
card at every step (`CPU_OFFLOAD`) does a first job wait a little for others to share its passes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

import torch

from image_worker.blame import blamed_on, blamed_on_nobody, settle, together_or_alone
from image_worker.edit.batching import ENOUGH_TOKENS, Limits, Load, joins
from image_worker.edit.conditions import (
    Conditions,
    encode_prompts,
    encode_references,
    row_lengths,
)
from image_worker.edit.decode import decode_pixels, preview
from image_worker.edit.denoise import Picture, check, start, step
from image_worker.edit.fitting import what_fits
from image_worker.errors import CardLost, OutOfMemory
from image_worker.model.build import Model
from image_worker.model.memory import (
    card_memory,
    memory_errors,
    side_stream,
    wait_for_card,
)
from image_worker.orders import Made, Order, Task

log = logging.getLogger(__name__)


class Engine:
    """Runs orders of one model. `submit` may be called from any thread."""

    def __init__(self, model: Model, batch_size: int, patience: float) -> None:
        """patience: seconds to wait for announced jobs where each pass of weights costs time."""
        self.model = model
        self._shares_passes = model.plan.streams("transformer")
        enough = None if self._shares_passes else ENOUGH_TOKENS
        self.limits = Limits(batch_size, model.plan.max_tokens, enough)
        self.busy_seconds = 0.0
        self._since = time.perf_counter()
        self._patience = patience
        self._aside = side_stream()
        # What is begun ahead makes no room: in its turn it may fit beside less.
        self._ahead = replace(model, gives_room=False)
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []
        self._announced = 0
        self._state = threading.Condition()
        self._closed = False
        self._lost = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the card is lost to this process; nothing runs any more."""
        return self._lost

    @property
    def waiting(self) -> int:
        """Jobs that are ready and not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that are on the card."""
        return len(self._running)

    def counts(self) -> dict[str, int]:
        """Jobs by where they are."""
        return {"waiting": self.waiting, "running": self.running}

    def busy_fraction(self) -> float:
        """Of the time since the start, the part with work."""
        return self.busy_seconds / (time.perf_counter() - self._since)

    def memory(self) -> tuple[int, int]:
        """The card's memory that is used, by all processes, and all of it, in bytes."""
        return card_memory()

    def submit(self, order: Order) -> Future[Made]:
        """Queues an order. Cancelling the future takes it off the card at the next step.

        The future raises `WorkerError`s, and whatever was unforeseen.
        """
        rows = row_lengths(self.model, order.prepared, order.size, len(order.seeds))
        load = Load(len(order.seeds), tuple(rows), order.style and order.style.key)
        task = Task(order, load, Future(), time.perf_counter())
        with self._state:
            if self._lost or self._closed:
                raise CardLost("this worker is being replaced; try again")
            self._waiting.append(task)
            self._state.notify_all()
        return task.future

    @contextmanager
    def announced(self) -> Iterator[None]:
        """While a job is being prepared: it will be submitted soon."""
        with self._state:
            self._announced += 1
        try:
            yield
        finally:
            with self._state:
                self._announced -= 1
                self._state.notify_all()

    def close(self) -> None:
        """Stops the thread after the step it is in. What is still queued is cancelled."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()
        for task in (*self._running, *self._waiting):
            task.future.cancel()

    # All below runs on the engine's thread.

    def _run(self) -> None:
        while self._wait_for_work():
            clock = time.perf_counter()
            begun = self._admit()
            try:
                self._begin(begun)
                self._step(self._running)
                self._tell(self._running)
                self._end([task for task in self._running if task.done])
            except Exception as error:  # noqa: BLE001 (what no job is to blame for)
                self._abandon(begun, error)
            self.busy_seconds += time.perf_counter() - clock

    def _wait_for_work(self) -> bool:
        with self._state:
            self._state.wait_for(lambda: self._closed or self._waiting or self._running)
            if self._shares_passes and not self._running:
                self._state.wait_for(self._batch_is_full, self._patience)
            return not self._closed

    def _batch_is_full(self) -> bool:
        pictures = sum(task.load.pictures for task in self._waiting)
        return self._closed or not self._announced or pictures >= self.limits.pictures

    def _admit(self) -> list[Task]:
        """Takes jobs from the queue, in its order: none overtakes another."""
        admitted: list[Task] = []
        with self._state:
            self._running = [task for task in self._running if not task.future.cancelled()]
            while self._waiting:
                task = self._waiting[0]
                loads = [other.load for other in (*self._running, *admitted)]
                if not task.future.cancelled() and not joins(loads, task.load, self.limits):
                    break
                self._waiting.popleft()
                if not task.future.cancelled():
                    admitted.append(task)
        return admitted

    def _begin(self, tasks: list[Task]) -> None:
        """Encodes prompts and references."""
        for task in tasks:
            task.passed("wait")
        for task in tasks:
            with blamed_on(task):
                task.pictures = task.pictures or self._pictures(self.model, task.order)
                wait_for_card()
                task.passed("encode")
                self._running.append(task)

    def _pictures(self, model: Model, order: Order) -> list[Picture]:
        """A job's pictures as noise."""
        text = encode_prompts(model, order.prepared)
        references = encode_references(model, order.prepared)
        conditions = Conditions(*text, references, order.prepared.shapes)
        adapter = order.adapter(model)
        return [
            start(
                model,
                conditions,
                order.size,
                seed=seed,
                steps=order.steps,
                cfg_scale=order.cfg_scale,
                adapter=adapter,
            )
            for seed in order.seeds
        ]

    def _step(self, tasks: Sequence[Task]) -> None:
        """One step of every picture."""
        together_or_alone([task for task in tasks if not task.future.done()], self._advance)

    def _advance(self, tasks: Sequence[Task]) -> None:
        """A step of every picture; of none, if it fails."""
        pictures = [picture for task in tasks for picture in task.pictures if not picture.done]
        if not pictures:
            return
        # Made on the side stream, to which their memory returns as soon as nobody holds them: the
        # next job would be begun in it while the card still reads them.
        held = [picture.latents for picture in pictures]
        try:
            step(self.model, pictures, self.limits)
        except OutOfMemory as error:
            if len(tasks) > 1:
                raise
            raise OutOfMemory(self._what_fits(tasks[0]) or error.message) from None
        self._begin_ahead()
        wait_for_card()
        del held
        for task in tasks:
            task.company.append(len(pictures))

    def _begin_ahead(self) -> None:
        """Encodes a waiting job while the card is busy with the step that it was just asked for.

        On a stream of its own: encoding is many small kernels, with gaps that the step's fill. What
        fails here is done again in the job's turn, where its failure is the job's.
        """
        task = self._next_ahead()
        if self._aside is None or task is None:
            return
        task.tried_ahead = True
        told = "a job could not be begun ahead; it will be in its turn"
        with blamed_on_nobody(told), memory_errors("encoding"), torch.cuda.stream(self._aside):
            task.pictures = self._pictures(self._ahead, task.order)

    def _next_ahead(self) -> Task | None:
        """The first job, within a batch's worth of pictures, that was not tried to begin yet."""
        pictures = 0
        for task in list(self._waiting):
            if pictures >= self.limits.pictures:
                return None
            if not (task.tried_ahead or task.future.cancelled()):
                return task
            pictures += task.load.pictures
        return None

    def _what_fits(self, task: Task) -> str | None:
        order = task.order
        return what_fits(self.model, order.size, len(order.prepared.references), task.load.rows)

    def _tell(self, tasks: Sequence[Task]) -> None:
        """Reports the step that was just done. A failure in here costs no job its picture."""
        for task in tasks:
            if task.order.watcher and not task.future.done():
                first = task.pictures[0]
                with blamed_on_nobody("progress could not be told"):
                    wanted = task.order.previews and not task.done
                    with memory_errors("a preview"):
                        shown = preview(self.model, first) if wanted else None
                    task.order.watcher(first.step, len(first.levels) - 1, shown)

    def _end(self, tasks: list[Task]) -> None:
        """Decodes."""
        for task in tasks:
            task.passed("denoise")
            with blamed_on(task):
                for picture in task.pictures:
                    check(picture)
                pixels = [decode_pixels(self.model, picture) for picture in task.pictures]
                task.passed("decode")
                together = sum(task.company) / len(task.company)
                settle(task, Made(pixels, task.seconds, together))
        self._running = [task for task in self._running if not task.future.done()]

    def _abandon(self, begun: Sequence[Task], error: Exception) -> None:
        """Answers every job at once, and takes no more: the process must be replaced.

        begun: jobs that left the queue, and may not be running yet.
        """
        log.critical("the card is lost; the worker must be replaced", exc_info=error)
        with self._state:
            self._lost = self._closed = True
            tasks = [*begun, *self._running, *self._waiting]
            self._running, self._waiting = [], deque()
        for task in tasks:
            settle(task, CardLost("the worker's card failed; try again on another worker"))
