"""Settings of the whole process: for its start, and for the time in which it serves."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading


def prepare_process() -> None:
    """For the start. torch must not be imported yet. `gc.enable()` ends the first of them."""
    # A start makes half a million objects and drops few: to go through them again and again takes
    # a seventh of the imports' time.
    gc.disable()
    # Otherwise blocks of many sizes leave gaps of gigabytes in the card's memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    threading.Thread(target=_wake_card, name="card", daemon=True).start()


def favour_event_loop() -> None:
    """For serving: has the event loop wait less for the other threads."""
    # What is there now stays: the collector, which would go through half a million objects now and
    # then, would keep the loop waiting for a quarter of a second.
    gc.collect()
    gc.freeze()
    # Beside threads that check and decode pictures, the loop waits so long for each in turn.
    sys.setswitchinterval(0.001)


def _wake_card() -> None:
    """CUDA's context, which torch would make after its import, in a third of a second.

    It is the one that torch uses later: a card has one "primary" context for each process.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # there is no card
        return
    context = ctypes.c_void_p()
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
