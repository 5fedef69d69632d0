"""`python -m image_worker compare`: which precision or format, by a fair trial on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_worker.errors import WorkerError

if TYPE_CHECKING:
    from image_worker.commands.compare_trial import Trial

_ABOUT = (
    "Runs the same job in several ways, each in a process of its own, in turns, and writes what "
    "they take and how alike their pictures are to index.html, results.json and summary.md. What "
    "was measured before is not measured again. Settings come from environment variables; a way "
    "adds to them."
)
_INTERRUPTED = 130  # as shells have it


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its options."""
    command = commands.add_parser(
        "compare", help="compare precisions and formats on this machine", description=_ABOUT
    )
    command.add_argument(
        "--ways",
        nargs="+",
        default=[],
        metavar="WAY",
        help="bf16, fp8, 8bit, 4bit; NAME=CHECKPOINT; or NAME:VARIABLE=value,VARIABLE=value "
        "(default: every precision; one that this machine cannot run is told with its reason)",
    )
    command.add_argument(
        "--runs", type=int, metavar="N", help="jobs of each way, besides its first: at least 5"
    )
    command.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="of the runs in turn (default: 1, 2…)"
    )
    command.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="one to four pictures"
    )
    command.add_argument("--prompt", help="what to do (default: the job of test_input.json)")
    command.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    command.add_argument(
        "--lora",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="run each way once more, with these merged",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="FOLDER",
        help="(default: %(default)s)",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="measure only what FOLDER does not have: the default"
    )
    again.add_argument("--fresh", action="store_true", help="forget what FOLDER has")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures and writes. Returns the exit status: 1 if a way failed, 2 if nothing could be done,
    130 after Ctrl-C, when what was measured is kept.
    """
    from image_worker.commands.compare_measuring import measure
    from image_worker.commands.compare_results import results

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
    from image_worker.commands.compare_words import markdown

    sys.stdout.write(f"{markdown(found)}\n{trial.out / 'index.html'}\n")
    return status or int(any(way["error"] for way in found["ways"]))


def make_trial(options: argparse.Namespace) -> Trial:
    """What the command line asks for.

    Raises:
        WorkerError: it cannot be done; says why.
        OSError: the folder cannot be written.
    """
    from image_worker.catalog import choose
    from image_worker.checkpoints import model_of
    from image_worker.commands import compare_ways
    from image_worker.commands.compare_job import make_job
    from image_worker.commands.compare_machine import code_version
    from image_worker.commands.compare_records import Records
    from image_worker.commands.compare_trial import Trial, seeds_of
    from image_worker.settings import Settings

    ways = compare_ways.parse(options.ways, options.lora)
    seeds = seeds_of(options.runs, options.seeds)
    settings = Settings.from_env()
    machine = _machine(options.out)
    entry = choose(model_of(settings), has_card=machine["card"] is not None)
    job = make_job(entry, options.image, options.prompt, options.steps)
    records = Records(options.out / "results.jsonl", fresh=options.fresh)
    return Trial(tuple(ways), job, seeds, options.out, records, machine, code_version())


def command_of(options: argparse.Namespace) -> str:
    """What to type to have the same again, with the settings that are not the defaults."""
    from image_worker.commands.compare_process import ALWAYS
    from image_worker.commands.compare_trial import settings_of
    from image_worker.commands.compare_ways import Way

    settings = settings_of(Way("as it is", ()))
    words = [f"{name}={value}" for name, value in settings.items() if name not in ALWAYS]
    words += ["python", "-m", "image_worker", "compare"]
    for name in ("ways", "runs", "seeds", "image", "prompt", "steps", "lora", "out"):
        value = getattr(options, name)
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _machine(out: Path) -> dict[str, Any]:
    """Asked in a process of its own: this one shall hold nothing of the card."""
    from image_worker.commands.compare_process import Process, WayFailed
    from image_worker.errors import InternalError

    with Process({}, out / "logs" / "machine.log") as process:
        try:
            return process.ask(do="machine")
        except WayFailed as failed:
            raise InternalError(f"the machine could not be looked at: {failed}") from None


def _cannot_write(out: Path, error: OSError) -> int:
    sys.stderr.write(f"error: {out} cannot be written: {error.strerror}\n")
    return 2


def _write(trial: Trial, found: dict[str, Any]) -> None:
    from image_worker.commands.compare_page import page
    from image_worker.commands.compare_records import write_whole
    from image_worker.commands.compare_words import markdown

    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(trial.out / "results.json", text + "\n")
    write_whole(trial.out / "summary.md", markdown(found))
    write_whole(trial.out / "index.html", page(found, trial.job, trial.out))


class _Bar:
    """Shows how far it is, and keeps the page up to date."""

    def __init__(self, trial: Trial, command: str) -> None:
        from tqdm import tqdm

        pending = [len(trial.pending(way)) for way in trial.ways]
        self._trial, self._command = trial, command
        self._bar = tqdm(total=sum(pending) + sum(map(bool, pending)), unit="job", disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begins(self, what: str) -> None:
        self._bar.set_description(what)

    def done(self, jobs: int) -> None:
        self._bar.update(jobs)

    def round(self) -> None:
        from image_worker.commands.compare_results import results

        _write(self._trial, results(self._trial, self._command))
