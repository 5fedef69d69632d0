"""What `compare` does: makes a trial of its options, measures it, and writes what came of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from image_worker.catalog import choose
from image_worker.checkpoints import model_of
from image_worker.commands.compare import ways
from image_worker.commands.compare.job import make_job
from image_worker.commands.compare.machine import code_version
from image_worker.commands.compare.measuring import measure
from image_worker.commands.compare.page import page
from image_worker.commands.compare.process import Process, WayFailed
from image_worker.commands.compare.records import Records, write_whole
from image_worker.commands.compare.results import results
from image_worker.commands.compare.trial import Trial, seeds_of
from image_worker.commands.compare.words import markdown
from image_worker.errors import InternalError, WorkerError
from image_worker.settings import Settings

_INTERRUPTED = 130  # as shells have it


def run(options: argparse.Namespace) -> int:
    """Returns the exit status, as said in `__init__.py`."""
    try:
        trial = make_trial(options)
    except WorkerError as error:
        sys.stderr.write(f"error: {error.type}: {error}\n")
        return 2
    except OSError as error:
        return _cannot_write(options.out, error)
    command, status = command_of(options), 0
    try:
        try:
            with _Bar(trial, command) as watcher:
                measure(trial, watcher)
        except KeyboardInterrupt:
            status = _INTERRUPTED
            sys.stderr.write("interrupted: the same command goes on from here\n")
        found = results(trial, command)
        _write(trial, found)
    except OSError as error:
        return _cannot_write(options.out, error)
    sys.stdout.write(f"{markdown(found)}\n{trial.out / 'index.html'}\n")
    return status or int(any(way["error"] for way in found["ways"]))


def make_trial(options: argparse.Namespace) -> Trial:
    """What the command line asks for.

    Raises:
        WorkerError: it cannot be done; says why.
        OSError: the folder cannot be written.
    """
    compared = ways.parse(options.ways, options.lora)
    seeds = seeds_of(options.runs, options.seeds)
    settings = Settings.from_env()
    machine = _machine(options.out)
    entry = choose(model_of(settings), has_card=machine["card"] is not None)
    job = make_job(entry, options.image, options.prompt, options.steps)
    records = Records(options.out / "results.jsonl", fresh=options.fresh)
    return Trial(tuple(compared), job, seeds, options.out, records, machine, code_version())


def command_of(options: argparse.Namespace) -> str:
    """What to type to have the same again, with the settings that are not the defaults."""
    settings = ways.settings_of(ways.Way("as it is", ()))
    words = [f"{name}={value}" for name, value in settings.items() if name not in ways.ALWAYS]
    words += ["python", "-m", "image_worker", "compare"]
    for name in ("ways", "runs", "seeds", "image", "prompt", "steps", "lora", "out"):
        value = getattr(options, name)
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _machine(out: Path) -> dict[str, Any]:
    """Asked in a process of its own: this one shall hold nothing of the card."""
    with Process({}, out / "logs" / "machine.log") as process:
        try:
            return process.ask(do="machine")
        except WayFailed as failed:
            raise InternalError(f"the machine could not be looked at: {failed}") from None


def _cannot_write(out: Path, error: OSError) -> int:
    sys.stderr.write(f"error: {out} cannot be written: {error.strerror}\n")
    return 2


def _write(trial: Trial, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(trial.out / "results.json", text + "\n")
    write_whole(trial.out / "summary.md", markdown(found))
    write_whole(trial.out / "index.html", page(found, trial.job, trial.out))


class _Bar:
    """Shows how far it is, and keeps the page up to date."""

    def __init__(self, trial: Trial, command: str) -> None:
        total = sum(
            trial.unfinished(way) + len(trial.pending(way)) + trial.unwatched(way)
            for way in trial.ways  # a first job, runs, and one that is watched
        )
        self._trial, self._command = trial, command
        self._bar = tqdm(total=total, unit="job", disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begins(self, what: str) -> None:
        self._bar.set_description(what)

    def done(self, jobs: int) -> None:
        self._bar.update(jobs)

    def round(self) -> None:
        _write(self._trial, results(self._trial, self._command))
