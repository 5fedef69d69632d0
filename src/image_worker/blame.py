"""Whose failure it is: one job's, which is answered with it, or everyone's, if the card is lost.

A step of several jobs fails as a whole and changes none of them; each is then tried alone, and
whoever fails again is to blame. Everyone's failures are raised, for the engine to end with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import contextmanager

from image_worker.errors import CardLost, WorkerError
from image_worker.model.memory import card_is_lost, memory_errors
from image_worker.orders import Made, Task

log = logging.getLogger(__name__)


def together_or_alone(tasks: Sequence[Task], work: Callable[[Sequence[Task]], None]) -> None:
    """Does `work` for all tasks at once. If that fails, for each alone: it is one's fault.

    Raises:
        Exception: no job is to blame.
    """
    if len(tasks) == 1:
        with blamed_on(tasks[0]):
            work(tasks)
        return
    try:
        work(tasks)
        return
    except Exception as error:
        if _is_everyones(error):
            raise
    for task in tasks:
        if not task.future.done():  # cancelled meanwhile
            together_or_alone([task], work)


@contextmanager
def blamed_on(task: Task) -> Iterator[None]:
    """A failure in here is this job's, unless the card is lost with it."""
    try:
        with memory_errors("this job"):
            yield
    except Exception as error:
        if _is_everyones(error):
            raise
        settle(task, error)


@contextmanager
def blamed_on_nobody(told: str) -> Iterator[None]:
    """A failure in here costs no job its picture; told: what the log says of it."""
    try:
        yield
    except Exception as error:
        if _is_everyones(error):
            raise
        log.warning(told, exc_info=True)


def settle(task: Task, outcome: Made | Exception) -> None:
    """Answers a job, if nobody did."""
    try:
        if isinstance(outcome, Exception):
            task.future.set_exception(outcome)
        else:
            task.future.set_result(outcome)
    except InvalidStateError:
        pass  # settled already, or cancelled meanwhile


def _is_everyones(error: Exception) -> bool:
    """Whether no job is to blame, and none can run any more."""
    if isinstance(error, WorkerError):
        return isinstance(error, CardLost)
    return card_is_lost()
