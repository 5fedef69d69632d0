"""`python -m image_worker clean`: gives back the room of what can be made or fetched again."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from image_worker.commands.fetched import InUse, fetched
from image_worker.commands.removable import Item, Kind, checked, made, remove
from image_worker.errors import WorkerError

if TYPE_CHECKING:
    from image_worker.settings import Settings

_DAY = 86_400
_ABOUT = (
    "Lists what of MODEL_DIR can be made or fetched again, and removes it with --yes: prepared "
    "weights, compiled kernels, downloads that were cut off, LoRAs that jobs named, and files that "
    "CHECKPOINT or TEXT_ENCODER_CHECKPOINT named but do not now. Models that were downloaded "
    "whole, LORA_DIR and pictures stay. Stop the workers that read from MODEL_DIR first."
)
_KINDS: dict[Kind, str] = {
    "prepared": "prepared weights, and what killed writers left",
    "kernels": "kernels",
    "downloads": "downloads that were cut off",
    "loras": "LoRAs that were downloaded for jobs",
    "checkpoints": "files that were downloaded for CHECKPOINT or TEXT_ENCODER_CHECKPOINT",
}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its options."""
    command = commands.add_parser(
        "clean", help="remove what can be made or fetched again", description=_ABOUT
    )
    command.add_argument("--yes", action="store_true", help="remove it, do not only list it")
    for kind, what in _KINDS.items():
        command.add_argument(
            f"--{kind}",
            action="append_const",
            dest="kinds",
            const=kind,
            help=f"only {what} (these can be combined; without any, all)",
        )
    command.add_argument(
        "--older-than",
        type=_days,
        default=0.0,
        metavar="DAYS",
        help="only what did not change for so long",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Lists or removes. Returns the exit status: 2 for a MODEL_DIR that cannot be, 1 for rests."""
    from image_worker.settings import Settings

    # What is not on this machine is not worth a warning here.
    logging.getLogger("image_worker").addHandler(logging.NullHandler())
    try:
        settings = Settings.from_env()
        folder = checked(settings.model_dir)
        found = [*made(folder), *fetched(folder, settings.download_timeout, in_use(settings))]
    except WorkerError as error:
        sys.stderr.write(f"error: {error.type}: {error}\n")
        return 2
    items = chosen(found, options.kinds or tuple(_KINDS), options.older_than)
    sys.stdout.write(f"{'removed from' if options.yes else 'in'} {settings.model_dir}:\n")
    return _remove(items, folder) if options.yes else _list(items, folder)


def in_use(settings: Settings) -> InUse:
    """What these settings name.

    Raises:
        InvalidSettings: a variable for a file names nothing.
    """
    from image_worker.model.from_url import checkpoint_here, text_encoder_here

    found = {
        "CHECKPOINT": checkpoint_here(settings) if settings.checkpoint else None,
        "TEXT_ENCODER_CHECKPOINT": (
            text_encoder_here(settings) if settings.text_encoder_checkpoint else None
        ),
    }
    named = {path.resolve(): variable for variable, path in found.items() if path is not None}
    folder = settings.lora_dir
    return InUse(named, folder and folder.expanduser().resolve())


def chosen(items: Sequence[Item], kinds: Sequence[Kind], days: float) -> list[Item]:
    """Those of some kinds that did not change for some days."""
    return [item for item in items if item.kind in kinds and item.age >= days * _DAY]


def _list(items: Sequence[Item], folder: Path) -> int:
    for item in items:
        _print(_line(item, folder, item.stays and f"stays: {item.stays}"))
    going = [item.size for item in items if item.stays is None]
    _print(f"{in_bytes(sum(going))} would be free; --yes removes it" if going else _NOTHING)
    return 0


def _remove(items: Sequence[Item], folder: Path) -> int:
    total, is_all = 0, True
    for item in items:
        if item.stays is not None:
            _print(_line(item, folder, f"stays: {item.stays}"))
            continue
        freed, problem = remove(item)
        total += freed
        is_all = is_all and problem is None
        _print(_line(item, folder, problem and f"stays: {problem}"))
    _print(f"{in_bytes(total)} are free now" if items else _NOTHING)
    return 0 if is_all else 1


_NOTHING = "there is nothing to remove"


def _line(item: Item, folder: Path, remark: str | None) -> str:
    name = item.path.relative_to(folder)
    about = item.about if remark is None else f"{item.about}; {remark}"
    return f"  {in_bytes(item.size):>9}  {_age(item.age):>8}  {name} ({about})"


def in_bytes(size: int) -> str:
    """In the unit that a person would take."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= least:
            return f"{size / least:.2f} {unit}"
    return f"{size} B"


def _age(seconds: float) -> str:
    for unit, length in (("days", _DAY), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds) / 60:.0f} min"


def _days(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of days")
    return number


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
