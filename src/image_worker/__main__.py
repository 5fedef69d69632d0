"""`python -m image_worker`: what is done beside serving, for which there is handler.py."""

from __future__ import annotations

import argparse
import sys

from image_worker.commands import calibrate, clean, compare, doctor, edit


def main() -> int:
    """Runs a command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m image_worker",
        description="Settings come from environment variables, as for handler.py.",
    )
    commands = parser.add_subparsers(required=True)
    edit.add_to(commands)
    doctor.add_to(commands)
    about = "download the model and write its weights as they serve"
    command = commands.add_parser("prepare", help=about, description=about)
    command.add_argument(
        "--whole",
        action="store_true",
        help="write all that later starts need, so that they do without the model's checkpoint",
    )
    command.add_argument(
        "--drop-checkpoint",
        action="store_true",
        help="with --whole: then remove the checkpoint and the merged LoRAs from MODEL_DIR",
    )
    command.set_defaults(run=_prepare)
    calibrate.add_to(commands)
    compare.add_to(commands)
    clean.add_to(commands)
    given, rest = parser.parse_known_args()
    if given.run is _prepare and given.drop_checkpoint and not given.whole:
        command.error("--drop-checkpoint takes --whole")
    if rest and (given.run is not edit.run or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # of what stands on both sides of options, argparse takes the first part only
        given.given += rest
    status: int = given.run(given)
    return status


def _prepare(given: argparse.Namespace) -> int:
    from image_worker.serve.prepare import prepare

    return prepare(whole=given.whole, drop=given.drop_checkpoint)


if __name__ == "__main__":
    sys.exit(main())
