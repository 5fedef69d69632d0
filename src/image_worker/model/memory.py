"""The card's state: waiting for it, and its errors told apart.

Too little memory is one job's error; a broken CUDA context is everyone's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from image_worker.errors import OutOfMemory

# torch's own error, and cuBLAS' and the driver's, which have no type of their own.
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED", re.IGNORECASE)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """A job too large for the card is that job's error.

    Raises:
        OutOfMemory: in place of torch's error, whose memory is free by then.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
    # Outside of the handler: the traceback keeps the tensors of the frames it goes through.
    torch.cuda.empty_cache()
    raise OutOfMemory(
        f"{what} needs more memory than the card has left; use a smaller size, fewer pictures, or "
        "num_images 1"
    )


def wait_for_card() -> None:
    """Returns when all that was asked of the card is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card_is_lost() -> bool:
    """Whether the CUDA context is broken: after some errors, nothing runs on the card any more."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def card_memory() -> tuple[int, int]:
    """Bytes that are used, by all processes, and all bytes of the card; zeros without one."""
    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return total - free, total
