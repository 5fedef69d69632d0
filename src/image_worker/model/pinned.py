"""Host memory that a card copies from by itself: page-locked, and no more than was asked for."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from image_worker.errors import DoesNotFit

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
            raise DoesNotFit(
                f"the host does not lock {self.memory.nbytes / 2**30:.2f} GiB more of its memory "
                f"for the card (CUDA error {status}); allow this process more host memory, or "
                "choose a smaller PRECISION_MODE"
            )
        weakref.finalize(self, _unlock, self.memory)


def _unlock(memory: Tensor) -> None:
    """Keeps `memory` until here."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
