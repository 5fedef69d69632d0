"""The transformer's modulation layers among the prepared weights: a file each, read when needed.

A worker that has them needs neither the checkpoint nor the LoRAs, which are merged into them.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from image_worker.errors import CardLost, ModelMismatch
from image_worker.model import prepared
from image_worker.model.modulation import Modulation, Read
from image_worker.model.packed import Layout, Slot
from image_worker.model.prepared import Prepared, Unit, digest
from image_worker.model.tensor_file import bytes_of, read_into

log = logging.getLogger(__name__)

_FOLDER = "modulation"


@dataclass(frozen=True)
class _Layer:
    """weight (out, in), bias (out)."""

    weight: Tensor
    bias: Tensor

    @property
    def slots(self) -> list[Slot]:
        return [Slot(name, self, name) for name in ("weight", "bias")]


def units(modulation: Modulation) -> dict[str, Unit]:
    """What their files are to hold. Each is read when it is written, and then let go."""
    return {
        f"{_FOLDER}/{name}": _unit(modulation, name, layer.weight.shape)
        for name, layer in modulation.layers.items()
    }


def _unit(modulation: Modulation, name: str, shape: torch.Size) -> Unit:
    weight, bias = (
        torch.empty(size, dtype=modulation.dtype, device="meta") for size in (shape, shape[:1])
    )
    layout = Layout.of(_Layer(weight, bias).slots)
    return Unit(layout, functools.partial(_pack, modulation.read, name, layout))


def _pack(read: Read, name: str, layout: Layout, memory: Tensor) -> None:
    layout.pack(_Layer(*read(name)).slots, memory)


class PreparedLayers:
    """Reads them, and checks every byte. Calls may come from several threads."""

    def __init__(self, found: Prepared) -> None:
        self._prepared = found
        self._lock = threading.Lock()
        self._damaged: str | None = None  # the first file of which it showed

    def check(self, names: Iterable[str]) -> None:
        """Whether there are files of these layers; what is in them shows when they are read.

        Raises:
            ModelMismatch: one is missing; says which.
        """
        folder = self._prepared.folder / _FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        for name in names:
            file = _file(name)
            if file not in self._prepared.files or file.rpartition("/")[2] not in there:
                raise ModelMismatch(f"{file} is missing")

    def __call__(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out) of the layer of that name, on the host.

        Raises:
            CardLost: its file is damaged, missing or cannot be read, so that not every job can run
                here any more. The next start makes a damaged folder again.
        """
        try:
            tensors = _read(self._prepared, _file(name))
            return tensors["weight"], tensors["bias"]
        except ModelMismatch as error:
            with self._lock:
                if self._damaged is None:  # after the first, all others are missing
                    self._damaged = _file(name)
                    log.critical("%s: this worker ends: %s", self._damaged, error)
                    if _is_damage(error):
                        self._discard()
            raise CardLost(
                f"{self._damaged} of the worker's weights is lost; try again on another worker"
            ) from error

    def _discard(self) -> None:
        """Takes the folder away, unless somebody made it again meanwhile."""
        try:
            if Prepared.find(self._prepared.folder) != self._prepared:
                return
        except ModelMismatch as error:
            log.warning("%s", error)
        prepared.discard(self._prepared.folder)


def _is_damage(error: ModelMismatch) -> bool:
    """Rather than a disk that does not answer, which may be a network's."""
    return getattr(error.__cause__, "errno", None) in (None, errno.ENOENT)


def _file(name: str) -> str:
    return f"{_FOLDER}/{name}.safetensors"


def _read(found: Prepared, name: str) -> dict[str, Tensor]:
    """A file's tensors, in memory of their own.

    Raises:
        ModelMismatch: it is damaged or missing; says which.
    """
    file, sums = found.open(name), found.files[name].sums
    memory = torch.empty(file.layout.size, dtype=torch.uint8)
    try:
        with file.path.open("rb") as stream:
            for number, start in enumerate(range(0, len(memory), found.chunk)):
                piece = memory[start : start + found.chunk]
                read_into(stream.fileno(), piece, file.start + start)
                if digest(bytes_of(piece)) != sums[1 + number]:
                    raise ModelMismatch(f"{name} is damaged: a checksum differs")
    except OSError as error:
        raise ModelMismatch(f"{name} cannot be read: {error}") from error
    return {part.name: part.of(memory) for part in file.layout.parts}
