"""Reads prepared files to where they are served, at the disk's speed, and checks every byte.

Several threads read pieces of files into pinned memory of their own, checksum them and copy them to
the card, each on its own stream: so reading, checking and copying overlap, and no file that stays
on the card is ever in the host's memory as a whole. It all goes on while its user does something
else, such as importing libraries.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model.packed import HOST, Slot
from image_worker.model.pinned import OnDisk, Pinned
from image_worker.model.prepared import Prepared, digest
from image_worker.model.stream import Held
from image_worker.model.tensor_file import TensorFile, bytes_of, read_into

_THREADS = 8


class Reading:
    """Files of a prepared checkpoint on their way to a device."""

    def __init__(
        self,
        prepared: Prepared,
        names: Iterable[str],
        device: torch.device,
        streamed: Set[str] = frozenset(),
        *,
        from_disk: bool = False,
    ) -> None:
        """Begins. names: of files, without their ending, in the order in which they are needed.

        streamed: those that are read to the host, from where they will pass through the device;
        from_disk: these are only checked now, and read again at every pass.

        Raises:
            ModelMismatch: a file is missing or its header damaged; says which.
        """
        self._device, self._own = device, threading.local()
        self._files = {name: prepared.open(f"{name}.safetensors") for name in names}
        if device.type == "cuda":
            torch.cuda.synchronize()  # the memory that is filled may be in use still
        total = sum(file.layout.size for file in self._files.values())
        self._bar = tqdm(total=total, desc="load", unit="B", unit_scale=True, disable=None)
        self._threads = ThreadPoolExecutor(_THREADS)
        self._places: dict[str, Tensor | Pinned | OnDisk] = {}
        self._work: dict[str, list[Future[None]]] = {}
        try:
            for name in self._files:
                away = name in streamed
                self._places[name] = self._place(name, away=away, from_disk=from_disk)
                self._work[name] = self._begin(prepared, name)
        except BaseException:
            self.close()
            raise

    def fill(self, units: Mapping[str, Sequence[Slot]]) -> dict[str, Held]:
        """Fills the slots of each unit, named as its file, with views of one run of bytes.

        Slots of those that are streamed stay empty: what they are to hold is returned.

        Raises:
            ModelMismatch: a file is damaged or holds other tensors; says which.
        """
        held = {}
        for name, slots in units.items():
            file = self._files.get(name)
            if file is None:
                raise ModelMismatch(f"{name}.safetensors is missing")
            _check_names(name, file, slots)
            place = self._whole(name)
            if isinstance(place, Tensor):
                file.layout.fill(slots, place)
                continue
            if isinstance(place, Pinned):
                place.lock(self._device)
            held[name] = Held(slots, file.layout, place)
        return held

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file by their names.

        Raises:
            ModelMismatch: it is damaged.
        """
        memory = self._whole(name)
        assert isinstance(memory, Tensor)
        return {part.name: part.of(memory) for part in self._files[name].layout.parts}

    def close(self) -> None:
        """Ends it, also where it is not done."""
        self._threads.shutdown(cancel_futures=True)
        self._bar.close()
        self._places.clear()

    def _place(self, name: str, *, away: bool, from_disk: bool) -> Tensor | Pinned | OnDisk:
        file = self._files[name]
        size = file.layout.size
        if not away:
            here = torch.device("cpu") if name.endswith(f"/{HOST}") else self._device
            return torch.empty(size, dtype=torch.uint8, device=here)
        return OnDisk(file.path, file.start, size) if from_disk else Pinned(size)

    def _whole(self, name: str) -> Tensor | Pinned | OnDisk:
        for piece in self._work[name]:
            piece.result()
        return self._places[name]

    def _begin(self, prepared: Prepared, name: str) -> list[Future[None]]:
        facts = prepared.files[f"{name}.safetensors"]
        file, place = self._files[name], self._places[name]
        memory = place.memory if isinstance(place, Pinned) else place
        work = []
        for number, start in enumerate(range(0, file.layout.size, prepared.chunk)):
            size = min(prepared.chunk, file.layout.size - start)
            part = memory[start : start + size] if isinstance(memory, Tensor) else None
            piece = _Piece(file, name, file.start + start, size, facts.sums[1 + number], part)
            work.append(self._threads.submit(self._read, piece))
        return work

    def _read(self, piece: _Piece) -> None:
        _read_piece(piece, self._device, self._own)
        self._bar.update(piece.size)


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file, from `start` on, their checksum, and where they belong, if anywhere."""

    file: TensorFile
    name: str
    start: int
    size: int
    checksum: str
    memory: Tensor | None


def _check_names(name: str, file: TensorFile, slots: Sequence[Slot]) -> None:
    there = {part.name for part in file.layout.parts} | file.layout.aliases.keys()
    wanted = {slot.name for slot in slots}
    if there != wanted:
        first = min(there ^ wanted)
        raise ModelMismatch(f"{name}.safetensors holds other tensors than the model: {first}")
    for slot in slots:
        part = file.parts.get(slot.name)
        if part is not None and part.shape != slot.tensor.shape:
            raise ModelMismatch(f"{name}.safetensors holds {slot.name} in another shape")


def _read_piece(piece: _Piece, device: torch.device, own: Any) -> None:
    """On the host, straight to its place; to a card, by way of this thread's pinned memory."""
    if piece.memory is not None and piece.memory.device.type != "cuda":
        _fetch(piece, piece.memory)
        return
    on_card = device.type == "cuda"
    if not hasattr(own, "memory"):
        own.memory = torch.empty(0, dtype=torch.uint8)
        own.stream = torch.cuda.Stream(device) if on_card else None  # type: ignore[no-untyped-call]
    if len(own.memory) < piece.size:
        own.memory = torch.empty(piece.size, dtype=torch.uint8, pin_memory=on_card)
    memory = own.memory[: piece.size]
    _fetch(piece, memory)
    if piece.memory is None:
        return
    with torch.cuda.stream(own.stream):
        piece.memory.copy_(memory, non_blocking=True)
    own.stream.synchronize()


def _fetch(piece: _Piece, memory: Tensor) -> None:
    try:
        descriptor = os.open(piece.file.path, os.O_RDONLY)
        try:
            read_into(descriptor, memory, piece.start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelMismatch(f"{piece.name}.safetensors cannot be read: {error}") from error
    if digest(bytes_of(memory)) != piece.checksum:
        raise ModelMismatch(f"{piece.name}.safetensors is damaged: a checksum differs")
