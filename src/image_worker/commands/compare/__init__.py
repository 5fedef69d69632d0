"""`python -m image_worker compare`: which precision or format, by a fair trial on this machine.

Here are its options; what it does, and all that takes long to import, is in `command.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

_ABOUT = (
    "Runs the same job in several ways, each in a process of its own, in turns, and writes what "
    "they take and how alike their pictures are to index.html, results.json and summary.md. What "
    "was measured before is not measured again. Settings come from environment variables; a way "
    "adds to them."
)


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
        help="bf16, fp8, 8bit, svdq, 4bit; NAME=CHECKPOINT; or NAME:VARIABLE=value,VARIABLE=value "
        "(default: every precision; one that this machine cannot run is told with its reason)",
    )
    command.add_argument(
        "--runs", type=int, metavar="N", help="jobs of each way, besides its first: at least 5"
    )
    command.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="of the runs in turn (default: 1, 2…)"
    )
    _add_job_to(command)
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


def _add_job_to(command: argparse.ArgumentParser) -> None:
    """What all ways do, and with which LoRAs each does it once more."""
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
        help="run each way once more, with these merged, or beside the weights",
    )


def run(options: argparse.Namespace) -> int:
    """Measures and writes. Returns the exit status: 1 if a way failed, 2 if nothing could be done,
    130 after Ctrl-C, when what was measured is kept.
    """
    from image_worker.commands.compare import command

    return command.run(options)
