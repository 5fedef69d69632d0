"""`python -m image_worker doctor`: whether a worker would start here, and what it would serve."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from image_worker.commands.facts import Facts, Finding, Forecast
from image_worker.commands.machine import look_at_driver, look_at_torch
from image_worker.commands.packages import look_at_packages, look_for_strangers
from image_worker.errors import InvalidSettings

if TYPE_CHECKING:
    from image_worker.settings import Settings

_ABOUT = (
    "Says whether a worker would start on this machine with these settings, what it would serve "
    "and what it would take. Downloads nothing and asks no network."
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its options."""
    command = commands.add_parser(
        "doctor", help="whether a worker would start here, and what fits", description=_ABOUT
    )
    command.add_argument("--json", action="store_true", help="print the same as JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Looks, and prints what it found. Returns the exit status: 1 if a start would be prevented."""
    # What the modules would log is among the findings.
    logging.getLogger("image_worker").addHandler(logging.NullHandler())
    try:
        facts, forecast = look()
        from image_worker.commands.findings import findings
    except ModuleNotFoundError as error:  # of one without which nothing else can be judged
        packages, _ = look_at_packages()
        missing = [package.name for package in packages if package.found is None]
        named = ", ".join(missing) or error.name
        sys.stderr.write(f"problem: packages are missing: {named}; see requirements.txt\n")
        return 1
    found = findings(facts, forecast)
    write = as_json if options.json else as_text
    sys.stdout.write(write(found, forecast) + "\n")
    return 1 if any(one.status == "problem" for one in found) else 0


def look() -> tuple[Facts, Forecast | None]:
    """Everything that is to be known. Takes as long as torch's import."""
    from image_worker.commands.findings import served
    from image_worker.commands.places import has_token, look_at_places
    from image_worker.model.host import free_host_memory

    settings, problem = _settings()
    driver = look_at_driver()  # before torch makes its context on the card
    packages, packages_problem = look_at_packages()
    facts = Facts(
        settings=settings,
        settings_problem=problem,
        driver=driver,
        torch=look_at_torch(),
        places=None,
        host=free_host_memory(),
        packages=packages,
        packages_problem=packages_problem,
        strangers=look_for_strangers(),
        has_token=has_token(),
    )
    entry = served(facts)
    if settings is None or entry is None:
        return facts, None
    facts = dataclasses.replace(facts, places=look_at_places(settings, entry))
    if facts.torch.version is None:
        return facts, None
    from image_worker.commands.checkpoint_file import look_at_files
    from image_worker.commands.forecast import forecast

    known, opened = look_at_files(settings, entry)
    facts = dataclasses.replace(
        facts, checkpoint=known.get("transformer"), text_encoder=known.get("text_encoder")
    )
    return facts, forecast(settings, entry, facts.card, facts.host, opened)


def _settings() -> tuple[Settings | None, str | None]:
    from image_worker.checkpoints import model_of
    from image_worker.job.storage import Storage
    from image_worker.lora_files import folder_of
    from image_worker.settings import Settings

    try:
        settings = Settings.from_env()
        model_of(settings)  # whether CHECKPOINT names anything
        Storage.from_settings(settings)  # as a start does
        folder_of(settings)
    except InvalidSettings as error:
        return None, str(error)
    return settings, None


def as_text(found: Sequence[Finding], forecast: Forecast | None) -> str:
    """A line for each finding, then the table."""
    lines = [f"{one.status:<7}  {one.topic}: {one.text}" for one in found]
    if forecast is not None and forecast.rows:
        lines += ["", *_table(forecast), *([] if forecast.own else _measured())]
    problems = sum(one.status == "problem" for one in found)
    end = "a worker would start" if not problems else f"{problems} to be solved before a start"
    return "\n".join([*lines, "", end])


def as_json(found: Sequence[Finding], forecast: Forecast | None) -> str:
    """The same for programs. peak: bytes."""
    content: dict[str, Any] = {
        "starts": not any(one.status == "problem" for one in found),
        "findings": [dataclasses.asdict(one) for one in found],
        "precisions": [dataclasses.asdict(row) for row in forecast.rows] if forecast else [],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _table(forecast: Forecast) -> list[str]:
    """Precisions are of what is not in a format of its own."""
    title = f"{forecast.of} on this card:"
    if forecast.own:
        title = f"{forecast.of} on this card, its {forecast.own}, the rest in:"
    cells = [("weights", "fits", "peak GiB", "products", "speed")]
    for row in forecast.rows:
        peak = "" if row.peak is None else f"{row.peak / 2**30:.1f}"
        cells.append((row.precision, row.places, peak, row.products, row.speed))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return [title, *(f"  {line}" for line in lines)]


def _measured() -> list[str]:
    from image_worker.commands.forecast import MEASURED, MEASURED_ON

    figures = ", ".join(f"{name} {seconds} s a job" for name, seconds in MEASURED.items())
    about = "1024x1024 with one reference, Lightning 4 steps, all on the card"
    return [f"  (measured on one {MEASURED_ON} only, {about}: {figures})"]
