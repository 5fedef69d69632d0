"""Where weights wait that pass through the card: in page-locked memory of the host, or on disk."""

from __future__ import annotations

import logging
import os
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from image_worker.errors import CardLost, DoesNotFit
from image_worker.model.tensor_file import read_into

log = logging.getLogger(__name__)

_PAGE = 4096


class Pinned:
    """Bytes of the host. Once locked, they are so for as long as this object lives.

    torch's own pinned memory comes in powers of two: a block of 1.3 GiB would take 2.
    """

    def __init__(self, size: int) -> None:
        whole = torch.empty(size + _PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % _PAGE
        self.memory: Tensor = whole[start : start + size]

    def lock(self, device: torch.device) -> None:
        """Lets `device` copy from it by itself; a CPU needs no such thing.

        It is quicker when the bytes are written already.

        Raises:
            DoesNotFit: the system does not lock so much.
        """
        if device.type != "cuda" or not len(self.memory):
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(runtime.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0))
        if status:
            with suppress(RuntimeError):  # or the next launch, of whatever, would report it
                torch.zeros(1, device=device)
            raise DoesNotFit(
                f"the host does not lock {self.memory.nbytes / 2**30:.2f} GiB more of its memory "
                f"for the card (CUDA error {status}); allow this process more host memory, or "
                "choose a smaller PRECISION_MODE"
            )
        weakref.finalize(self, _unlock, self.memory)


def _unlock(memory: Tensor) -> None:
    """Keeps `memory` until here."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


class OnDisk:
    """Bytes of a file, which is read whenever they are needed.

    The file is held open: it may lose its name meanwhile.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._name, self._start, self.size = path.name, start, size
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, memory: Tensor) -> None:
        """Into `memory` (bytes, of this size, on the host).

        Raises:
            CardLost: the file cannot be read, and so no job can run here any more.
        """
        try:
            read_into(self._descriptor, memory, self._start)
        except OSError as error:
            log.critical("%s cannot be read any more: %s", self._name, error)
            raise CardLost(
                "the worker's weights cannot be read any more; try again on another worker"
            ) from error
