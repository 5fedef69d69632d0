"""Reads prepared files to where they are served, at the disk's speed, and checks every byte.

Several threads read pieces of files into pinned memory of their own, checksum them and copy them to
the card, each on its own stream: so reading, checking and copying overlap, and no file is ever in
the host's memory as a whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model.packed import Slot
from image_worker.model.prepared import Prepared, digest
from image_worker.model.tensor_file import TensorFile, bytes_of, read_into

_THREADS = 8


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file, from `start` on, their checksum, and where they belong."""

    file: TensorFile
    name: str
    start: int
    checksum: str
    memory: Tensor


def load(prepared: Prepared, units: Mapping[str, Sequence[Slot]], device: torch.device) -> None:
    """Fills the slots of each unit, named as its file, with views of one run of bytes on `device`.

    Raises:
        ModelMismatch: a file is missing or damaged, or holds other tensors; says which.
    """
    files = {name: prepared.open(f"{name}.safetensors") for name in units}
    for name, slots in units.items():
        _check_names(name, files[name], slots)
    if device.type == "cuda":
        torch.cuda.synchronize()  # the memory that is filled may be in use still
    memories = {
        name: torch.empty(file.layout.size, dtype=torch.uint8, device=device)
        for name, file in files.items()
    }
    pieces = [piece for name in units for piece in _pieces(prepared, name, files[name], memories)]
    _read(pieces, device)
    for name, slots in units.items():
        files[name].layout.fill(slots, memories[name])


def tables(prepared: Prepared, name: str, device: torch.device) -> dict[float, Tensor]:
    """Modulation's tables by their timestep, which is the tensor's name.

    Raises:
        ModelMismatch: the file is missing or damaged.
    """
    file = prepared.open(f"{name}.safetensors")
    memory = torch.empty(file.layout.size, dtype=torch.uint8, device=device)
    _read(list(_pieces(prepared, name, file, {name: memory})), device)
    return {float(part.name): part.of(memory) for part in file.layout.parts}


def _check_names(name: str, file: TensorFile, slots: Sequence[Slot]) -> None:
    there = {part.name for part in file.layout.parts} | file.layout.aliases.keys()
    wanted = {slot.name for slot in slots}
    if there != wanted:
        first = min(there ^ wanted)
        raise ModelMismatch(f"{name}.safetensors holds other tensors than the model: {first}")


def _pieces(
    prepared: Prepared, name: str, file: TensorFile, memories: Mapping[str, Tensor]
) -> Iterator[_Piece]:
    facts, memory = prepared.files[f"{name}.safetensors"], memories[name]
    for number, start in enumerate(range(0, len(memory), prepared.chunk)):
        piece = memory[start : start + prepared.chunk]
        yield _Piece(file, name, file.start + start, facts.sums[1 + number], piece)


def _read(pieces: Sequence[_Piece], device: torch.device) -> None:
    own = threading.local()
    total = sum(len(piece.memory) for piece in pieces)
    with (
        tqdm(total=total, desc="load", unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        work = [threads.submit(_read_piece, piece, device, own) for piece in pieces]
        try:
            for done, piece in zip(work, pieces, strict=True):
                done.result()
                bar.update(len(piece.memory))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _read_piece(piece: _Piece, device: torch.device, own: Any) -> None:
    """On the host, straight to its place; for a card, by way of this thread's pinned memory."""
    if device.type != "cuda":
        _fetch(piece, piece.memory)
        return
    if not hasattr(own, "memory"):
        own.memory = torch.empty(0, dtype=torch.uint8)
        own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    if len(own.memory) < len(piece.memory):
        own.memory = torch.empty(len(piece.memory), dtype=torch.uint8, pin_memory=True)
    memory = own.memory[: len(piece.memory)]
    _fetch(piece, memory)
    with torch.cuda.stream(own.stream):
        piece.memory.copy_(memory, non_blocking=True)
    own.stream.synchronize()


def _fetch(piece: _Piece, memory: Tensor) -> None:
    descriptor = os.open(piece.file.path, os.O_RDONLY)
    try:
        read_into(descriptor, memory, piece.start)
    except OSError as error:
        raise ModelMismatch(f"{piece.name}.safetensors cannot be read: {error}") from error
    finally:
        os.close(descriptor)
    if digest(bytes_of(memory)) != piece.checksum:
        raise ModelMismatch(f"{piece.name}.safetensors is damaged: a checksum differs")
