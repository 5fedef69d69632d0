"""Blocks whose weights pass through the card: copied from the host, beside the work before them.

Blocks run one after the other, always in the same order. Those that do not stay share a few buffers
on the card: while one computes, the next one's weights arrive on a stream of their own. After the
last block come the first ones of the next pass, so that a pass begins with its weights there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.errors import DoesNotFit
from image_worker.model.host import HOST_RESERVE, free_host_memory
from image_worker.model.packed import Layout, Slot, slots
from image_worker.model.pinned import OnDisk, Pinned

BUFFERS = 2  # one is computed with, one is filled


@dataclass(frozen=True)
class Held:
    """A block's weights on the host: where they go, how they lie, and their bytes."""

    slots: Sequence[Slot]
    layout: Layout
    host: Pinned | OnDisk

    @classmethod
    def of(cls, slots: Sequence[Slot], device: torch.device) -> Held:
        """A copy of what slots hold now, from where `device` is to be fed.

        Raises:
            DoesNotFit: the host has no memory for it.
        """
        layout = Layout.of(slots)
        host = Pinned(layout.size)
        layout.pack(slots, host.memory)
        host.lock(device)
        return cls(slots, layout, host)

    def settle(self) -> None:
        """Slots refer to this copy, if it is in memory."""
        if isinstance(self.host, Pinned):
            self.layout.fill(self.slots, self.host.memory)


class Blocks(nn.ModuleList):
    """A model's blocks. To run them is to iterate over `in_turn`."""

    def __init__(self, blocks: Sequence[nn.Module] = ()) -> None:
        super().__init__(blocks)
        self._held: dict[int, Held] = {}
        self._passages: list[_Passage] = []

    @property
    def away(self) -> list[int]:
        """Numbers of the blocks that do not stay on the card."""
        return sorted(self._held)

    def in_turn(self) -> Iterator[Any]:
        """Each block, when its weights are on the card; they may leave when the next one is asked
        for."""
        streamed = {number: index for index, number in enumerate(self.away)}
        for number, block in enumerate(self):
            index = streamed.get(number)
            if index is None:
                yield block
                continue
            passage = self._passages[index % len(self._passages)]
            passage.bring(index // len(self._passages))
            try:
                yield block
            finally:
                passage.leave()

    def stream(self, held: Mapping[int, Held], device: torch.device) -> None:
        """From now on these blocks pass through the card, by their numbers."""
        if not held:
            return
        after = {**self._held, **held}
        if not self._passages:
            stream = _side_stream(device)
            size = max(self._size(number, after) for number in range(len(self)))
            self._passages = [
                _Passage(size, device, stream) for _ in range(min(BUFFERS, len(self)))
            ]
        self._held = after
        queues: list[list[Held]] = [[] for _ in self._passages]
        for index, number in enumerate(self.away):
            queues[index % len(queues)].append(self._held[number])
        for passage, queue in zip(self._passages, queues, strict=True):
            passage.serve(queue)

    def give_up(self, device: torch.device) -> bool:
        """Half of the blocks that stayed leave the card for good.

        Returns false if none stayed, or the host has no memory for them.
        """
        stayed = [number for number in range(len(self)) if number not in self._held]
        leaving = stayed[::2]
        if not leaving or len(leaving) + len(self._held) < BUFFERS:
            return False
        needed = sum(self._size(number, {}) for number in leaving)
        free = free_host_memory()
        if free is not None and needed + HOST_RESERVE > free:
            return False
        _wait(device)
        try:
            held = {number: Held.of(list(slots(self[number])), device) for number in leaving}
        except DoesNotFit:
            return False
        for one in held.values():
            one.settle()  # before there are buffers, for which there is no room yet
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self.stream(held, device)
        return True

    def _size(self, number: int, held: Mapping[int, Held]) -> int:
        """Bytes of a block, whose slots may be empty where it is held."""
        one = held.get(number)
        return one.layout.size if one else Layout.of(slots(self[number])).size

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Meanwhile, all of them refer to the host's copies of what passes."""
        for held in self._held.values():
            held.settle()
        try:
            yield
        finally:
            for passage in self._passages:
                passage.fill()


def blocks_of(*modules: nn.Module) -> list[Blocks]:
    """All lists of blocks in them."""
    return [part for module in modules for part in module.modules() if isinstance(part, Blocks)]


class _Passage:
    """Memory on the card that the weights of several blocks pass through, one after the other."""

    def __init__(self, size: int, device: torch.device, stream: Any) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._device, self._stream = device, stream
        self._queue: list[Held] = []
        self._present: int | None = None  # which of them is there, or on its way
        self._arrived, self._left = _event(stream), _event(stream)
        self._reader: ThreadPoolExecutor | None = None
        self._read: Future[None] | None = None
        self._between: Pinned | None = None  # where what is read from disk waits for its copy

    def serve(self, queue: list[Held]) -> None:
        """These pass, from now on."""
        self._queue, self._present = queue, None
        if self._reader is None and any(isinstance(held.host, OnDisk) for held in queue):
            self._between = Pinned(len(self._memory))
            self._between.lock(self._device)
            # Its thread refers to it weakly, and so ends when nobody has this passage any more.
            self._reader = ThreadPoolExecutor(1, "weights")
        self.fill()

    def fill(self) -> None:
        """All blocks refer to the same memory, each at its time."""
        for held in self._queue:
            held.layout.fill(held.slots, self._memory)

    def bring(self, index: int) -> None:
        """Has the card wait until that one's weights are there.

        Raises:
            CardLost: they are on disk, and cannot be read any more.
        """
        if self._present != index:  # the first pass, or one that was given up before its end
            self.leave(following=index)
        if self._read is not None:
            read, self._read = self._read, None
            try:
                read.result()
            except BaseException:
                self._present = None
                raise
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def leave(self, following: int | None = None) -> None:
        """What is there is not needed any more, when the card has come this far: the next one."""
        if following is None:
            if self._present is None:  # it never arrived
                return
            following = (self._present + 1) % len(self._queue)
        if following == self._present:
            return
        if self._read is not None:  # for a pass that was given up
            wait([self._read])
        host, self._present = self._queue[following].host, None
        if self._stream is not None:
            self._left.record(torch.cuda.current_stream(self._device))
        if isinstance(host, Pinned):
            self._copy(host.memory)
            self._read = None
        else:
            assert self._reader is not None
            self._read = self._reader.submit(self._fetch, host)
        self._present = following

    def _fetch(self, host: OnDisk) -> None:
        """On the reader's thread."""
        assert self._between is not None
        if self._stream is not None:
            self._arrived.synchronize()  # the copy of what was read before
        memory = self._between.memory[: host.size]
        host.read(memory)
        self._copy(memory)

    @torch.inference_mode()  # in which the memory may have been allocated
    def _copy(self, memory: Tensor) -> None:
        if self._stream is None:
            self._memory[: len(memory)].copy_(memory)
            return
        self._stream.wait_event(self._left)
        with torch.cuda.stream(self._stream):
            self._memory[: len(memory)].copy_(memory, non_blocking=True)
        self._arrived.record(self._stream)


def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _event(stream: Any) -> Any:
    return None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
