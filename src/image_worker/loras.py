"""The LoRAs that jobs name: from a name to what the card adds to its products.

Files are found, read and checked on the threads that prepare jobs, each once however many jobs name
it at a time. A job in the queue holds names and no tensors, so a full queue takes no memory; what
was used last stays in memory, on the host and on the card.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from image_worker.errors import InvalidLora, LoraUnavailable, ModelMismatch, WorkerError
from image_worker.job import loras as sources
from image_worker.job.budget import Budget
from image_worker.job.request import LoraOption
from image_worker.lora_files import LoraFiles
from image_worker.model import adapters
from image_worker.model.adapters import Adapter
from image_worker.model.build import Model
from image_worker.model.kept import Kept
from image_worker.model.lora import Lora
from image_worker.model.memory import with_room
from image_worker.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """A file that is here and was checked, as it was then: a changed one is another."""

    path: Path
    changed: int
    size: int


@dataclass(frozen=True)
class Style:
    """The LoRAs of a job, each with its scale. nbytes: what they take on the card."""

    wanted: tuple[tuple[Wanted, float], ...]
    nbytes: int
    loras: Loras

    @property
    def key(self) -> Hashable:
        """The same for equal LoRAs and scales only."""
        return self.wanted

    def adapter(self, model: Model) -> Adapter:
        """They on the card, where they are kept for later jobs. On the engine's thread only.

        Raises:
            InvalidLora: they do not go with the type that the model computes in.
            LoraUnavailable: a file was removed meanwhile.
            OutOfMemory: the card has no room for them.
        """
        found = model.adapters.get(self.key)
        if found is not None:
            return found
        reads = model.transformer.reads
        try:
            scaled = [(self.loras.read(wanted), scale) for wanted, scale in self.wanted]
            found = with_room(
                model.make_room,
                lambda: Adapter.of(self.key, scaled, reads, model.device, model.dtype),
            )
        except ModelMismatch as error:
            raise InvalidLora(error.message, field="loras") from error
        model.adapters.put(self.key, found)
        return found


class Loras:
    """Finds and reads LoRAs for jobs. May be used from any thread."""

    def __init__(self, settings: Settings, model: Model) -> None:
        """
        Raises:
            InvalidSettings: `LORA_DIR` is no folder.
        """
        self._model = model
        self._files = LoraFiles(settings)
        self._read: Kept[Lora] = Kept(settings.lora_cache_mb * 10**6)
        self._reading = Budget(2 * self._files.max_bytes)  # of the host's memory
        self._once = _Once()

    def style(self, options: Sequence[LoraOption]) -> Style | None:
        """What a job's LoRAs are to the engine; None if nothing is to be added.

        Raises:
            InvalidLora: what is named is no LoRA for this model, or may not be had.
            LoraUnavailable: it cannot be had now.
        """
        for number, option in enumerate(options):
            with _naming(number):  # all of them before any is fetched
                self._files.check_allowed(sources.parse(option.source))
        found, size = [], 0
        for number, option in enumerate(options):
            if not option.scale:
                continue
            with _naming(number):
                wanted, taken = self._once.do(option.source, partial(self._have, option.source))
            found.append((wanted, option.scale))
            size += taken
        if not found:
            return None
        return Style(tuple(sorted(found, key=lambda one: (str(one[0].path), one[1]))), size, self)

    def read(self, wanted: Wanted) -> Lora:
        """The file, if it is not in memory yet.

        Raises:
            InvalidLora: it is no LoRA for this model.
            LoraUnavailable: it is not there any more.
        """
        found = self._read.get(wanted)
        if found is not None:
            return found
        try:
            with self._reading.take(wanted.size):
                found = Lora.read(wanted.path)
                adapters.check(found, self._model.transformer.config)
                self._read.put(wanted, found)
        except ModelMismatch as error:
            raise InvalidLora(error.message) from error
        except OSError as error:
            raise LoraUnavailable("the LoRA's file could not be read") from error
        return found

    def _have(self, text: str) -> tuple[Wanted, int]:
        """The file that is named, checked; and what it takes on the card."""
        path = self._files.find(sources.parse(text))
        try:
            status = path.stat()
        except OSError as error:
            raise LoraUnavailable("the LoRA's file could not be read") from error
        if status.st_size > self._files.max_bytes:
            raise sources.too_large(self._files.max_bytes)
        wanted = Wanted(path, status.st_mtime_ns, status.st_size)
        lora = self.read(wanted)
        return wanted, adapters.card_bytes([(lora, 1.0)], self._model.dtype)


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Errors say which of a job's LoRAs is meant. Others may wait for the same file: one each."""
    try:
        yield
    except WorkerError as error:
        field = f"loras[{number}].source"
        raise type(error)(error.message, field=field) from error.__cause__


class _Once:
    """Work that several threads ask for at a time is done once, for all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._going_on: dict[Hashable, Future[object]] = {}

    def do(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns or raises, which is the same for all of the same key."""
        with self._lock:
            future = self._going_on.get(key)
            mine = future is None
            if future is None:
                future = self._going_on[key] = Future()
        if mine:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 (raised below, in every thread)
                future.set_exception(error)
            finally:
                with self._lock:
                    del self._going_on[key]
        return future.result()  # type: ignore[return-value]
