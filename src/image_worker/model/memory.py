"""The card's state: waiting for it, and its errors told apart.

Too little memory is one job's error; a broken CUDA context is everyone's.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from image_worker.errors import OutOfMemory

T = TypeVar("T")

# torch's own error, and cuBLAS' and the driver's, which have no type of their own.
_NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED", re.IGNORECASE)

_ROOM_BESIDE = 4 * 2**30  # bytes: what encoding takes at the usual sizes, and as much again


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
        # They keep tensors, and are kept themselves by whoever handles the error that follows.
        traceback.clear_frames(error.__traceback__)
    torch.cuda.empty_cache()
    raise OutOfMemory(
        f"{what} needs more memory than the card has left; use a smaller size, fewer pictures, or "
        "num_images 1"
    )


def with_room(make_room: Callable[[], bool], work: Callable[[], T]) -> T:
    """What `work` returns; it is tried again for as long as more room can be made for it.

    Raises:
        OutOfMemory: the card does not hold it whatever else leaves.
    """
    while True:
        try:
            with memory_errors("this job"):
                return work()
        except OutOfMemory as error:
            failure = error
        if not make_room():
            raise failure


def side_stream() -> torch.cuda.Stream | None:
    """A stream for work beside the main one; None where the card has no room for that."""
    if not torch.cuda.is_available() or free_memory() < _ROOM_BESIDE:
        return None
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


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


def free_memory() -> int:
    """Bytes that this process can still take on the card, past what it keeps; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)  # `GPU_MAX_GIB`
    return min(free, allowed - torch.cuda.memory_reserved())


def release() -> None:
    """Gives memory back that nobody refers to any more, as after a start that was given up."""
    wait_for_card()  # copies may be on their way still
    gc.collect()  # the transformer holds itself
    torch.cuda.empty_cache()


def card_memory() -> tuple[int, int]:
    """Bytes that are used, by all processes, and all bytes of the card; zeros without one."""
    if not torch.cuda.is_available():
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    return total - free, total
