"""Measures what is missing of a trial: ways take turns, or go one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from image_worker.commands.compare.process import Process, WayFailed
from image_worker.commands.compare.trial import Trial
from image_worker.commands.compare.ways import Way
from image_worker.model.host import free_host_memory

KERNEL_ROUNDS = 20
_SPARE = 1.15  # how much more than the largest way so far must be free for the next one
_RESERVE = 2**30  # bytes: of the card for CUDA itself, of the host for other processes
_NO_ROOM = ("does_not_fit", "out_of_memory", "process_ended")


class Watcher(Protocol):
    """Is told how it goes on."""

    def begins(self, what: str) -> None:
        """Before something that takes long."""

    def done(self, jobs: int) -> None:
        """After so many jobs."""

    def round(self) -> None:
        """After each round: all ways have as many runs."""


class NoRoom(Exception):
    """The ways cannot all be held at the same time."""


def measure(trial: Trial, watcher: Watcher, start: Callable[..., Process] = Process) -> None:
    """Measures until nothing is pending; what fails is a record, and the others go on."""
    try:
        _in_turns(trial, list(filter(trial.unfinished, trial.ways)), watcher, start)
    except NoRoom:
        for way in filter(trial.unfinished, trial.ways):
            _in_turns(trial, [way], watcher, start)
    _measure_kernels(trial, watcher, start)


def _in_turns(
    trial: Trial, ways: Sequence[Way], watcher: Watcher, start: Callable[..., Process]
) -> None:
    """Rounds of one run of each way, every other one backwards: nobody is always behind the same.

    Raises:
        NoRoom: one of several ways does not find the memory that it would have alone.
    """
    with ExitStack() as stack:
        processes: dict[Way, Process] = {}
        most: dict[str, int] = {}
        for way in ways:
            process = _started(trial, way, watcher, start, most, bool(processes))
            if process is not None:
                processes[way] = stack.enter_context(process)
        rounds = list(trial.runs())
        for number, run in enumerate(rounds):
            order = list(processes.items())
            for way, process in order if number % 2 == 0 else reversed(order):
                if run not in trial.pending(way):
                    continue
                watcher.begins(f"{way.name}: run {number + 1} of {len(rounds)}")
                try:
                    _run(trial, way, process, run, in_turns=len(processes) > 1)
                    watcher.done(1)
                except WayFailed as failed:
                    if len(processes) > 1 and failed.type in _NO_ROOM:
                        raise NoRoom from None  # alone, it might have had what it lacks
                    _failed(trial, way, failed, watcher)
                    process.close()
                    del processes[way]
            watcher.round()
        for way, process in processes.items():
            if trial.unwatched(way):
                _watch(trial, way, process, watcher, alone=len(processes) == 1)


def _watch(trial: Trial, way: Way, process: Process, watcher: Watcher, *, alone: bool) -> None:
    """One more picture, to see where the card's time goes. Its seconds do not count.

    Raises:
        NoRoom: it lacks memory that it might have alone.
    """
    watcher.begins(f"{way.name}: where the card's time goes")
    try:
        found = process.ask(do="card_time", input=_job(trial, trial.seeds[0]))
    except WayFailed as failed:
        if not alone and failed.type in _NO_ROOM:
            raise NoRoom from None
        found = {"problem": f"{failed.type}: {failed.message}"}
    trial.records.add("card_time", trial.key(way), **found)
    watcher.done(1)


def _started(
    trial: Trial,
    way: Way,
    watcher: Watcher,
    start: Callable[..., Process],
    most: dict[str, int],
    has_company: bool,
) -> Process | None:
    """A process with its cold start and first job behind it; None: that failed, and is recorded.

    most: bytes of the card and of the host that a way took so far, at most; brought up to date.
    """
    if has_company and not _has_room(most):
        raise NoRoom
    watcher.begins(f"{way.name}: starting")
    process = start(dict(way.variables), trial.log(way))
    try:
        started = process.ask(do="start", begun=process.begun, loras=list(way.loras))
        if has_company and started["confined"]:
            raise NoRoom  # alone, it might have more room
        watcher.begins(f"{way.name}: first job")
        first = process.ask(do="edit", input=_job(trial, trial.seeds[0]), picture=None)
    except WayFailed as failed:
        process.close()
        if has_company and failed.type in _NO_ROOM:
            raise NoRoom from None
        _failed(trial, way, failed, watcher)
        return None
    except BaseException:
        process.close()
        raise
    trial.records.add("start", trial.key(way), first_job=first["seconds"], **started)
    for name in ("card", "host"):
        most[name] = max(most.get(name, 0), first[name] or 0)
    most["card_free"] = first["card_free"] or 0
    watcher.done(1)
    return process


def _has_room(most: dict[str, int]) -> bool:
    """Whether one more way as large as the largest so far could be held beside the others."""
    host = free_host_memory()
    on_card = not most["card"] or most["card"] * _SPARE + _RESERVE <= most["card_free"]
    return on_card and (host is None or most["host"] * _SPARE + _RESERVE <= host)


def _run(trial: Trial, way: Way, process: Process, run: tuple[int, int], *, in_turns: bool) -> None:
    seed, repetition = run
    picture = trial.picture(way, seed)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found = process.ask(
        do="edit",
        input=_job(trial, seed),
        picture=None if repetition else str(picture.absolute()),
    )
    facts = {"seed": seed, "repetition": repetition, "in_turns": in_turns}
    trial.records.add("run", trial.key(way), **facts, **found)


def _job(trial: Trial, seed: int) -> dict[str, Any]:
    return {**trial.job, "seed": seed}


def _failed(trial: Trial, way: Way, failed: WayFailed, watcher: Watcher) -> None:
    trial.records.add("error", trial.key(way), type=failed.type, message=failed.message)
    watcher.done(0)


def _measure_kernels(trial: Trial, watcher: Watcher, start: Callable[..., Process]) -> None:
    """In a process of its own, when the ways' have ended. Without a card there is nothing to do."""
    key = trial.kernels_key()
    if key is None or trial.machine["card"] is None or trial.records.first("kernels", key):
        return
    watcher.begins("kernels")
    with start({}, trial.out / "logs" / "kernels.log") as process:
        try:
            found = process.ask(do="kernels", shape=trial.shape(), rounds=KERNEL_ROUNDS)
        except WayFailed as failed:
            found = {"problem": f"{failed.type}: {failed.message}"}
    trial.records.add("kernels", key, **found)
