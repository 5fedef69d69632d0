"""What came of a trial in words and in a table: for `summary.md`, the page, and the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

TITLES = (
    "way",
    "start, s",
    "first job, s",
    "s per picture",
    "interval",
    "s per step",
    "card, GiB",
    "host, GiB",
    "PSNR, dB",
    "SSIM",
)
_GIB = 2**30


def markdown(results: Mapping[str, Any]) -> str:
    """`summary.md`: the table, and what belongs to it."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + " --- |" * len(TITLES)]
    for way in results["ways"]:
        cells = (cell.replace("|", "\\|") for cell in row(way))
        lines.append(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |")
    return "\n".join([*lines, "", *notes(results), "", f"    {results['command']}", ""])


def row(way: Mapping[str, Any]) -> list[str]:
    """A way's cells under TITLES. What was not measured is empty; an error stands for the figures.

    PSNR and SSIM are medians over the seeds.
    """
    start, seconds, steps = way["start"], way["seconds"], way["step_seconds"]
    if way["error"] and not seconds:
        return [way["name"], f"{way['error']['type']}: {way['error']['message']}", *[""] * 8]
    return [
        way["name"],
        number(start["seconds"]) if start else "",
        number(way["first_job"]) if way["first_job"] is not None else "",
        number(seconds["median"]) if seconds else "",
        interval(seconds) if seconds else "",
        number(steps["median"]) if steps else "",
        gib(way["card"]),
        gib(way["host"]),
        decibels(way),
        likeness(way),
    ]


def sentence(way: Mapping[str, Any], ways: Sequence[Mapping[str, Any]]) -> str:
    """What to know of a way, beside its name."""
    error, seconds = way["error"], way["seconds"]
    if error and not seconds:
        return f"did not run: {error['type']}: {error['message']}"
    if not seconds:
        return "has not been measured yet."
    parts = [f"{number(seconds['median'])} s a picture{_against_fastest(way, ways)}"]
    if way["card"] is not None:
        parts.append(f"{gib(way['card'])} GiB of the card")
    else:
        parts.append(f"{gib(way['host'])} GiB of the host's memory")
    if way["against"] is None:
        parts.append("its pictures are what others are compared with")
    elif way["pictures"]:
        alike = f", SSIM {likeness(way)}" if likeness(way) else ""
        parts.append(f"pictures are {decibels(way)} dB{alike} from those of {way['against']}")
    text = "; ".join(parts) + "."
    return text + (f" It then failed: {error['type']}: {error['message']}" if error else "")


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the figures mean, a sentence each."""
    counts = {way["seconds"]["count"] for way in results["ways"] if way["seconds"]}
    found = [
        f"Medians of {' or '.join(map(str, sorted(counts))) or 'no'} runs of "
        f"{len(set(results['seeds']))} seeds, the first job apart. {results['order']}",
        *_about_intervals(results),
        "A start is the process' first, from its beginning to a model that has made a small edit; "
        "where weights were prepared for later starts, that is in it. Card: what torch reserved "
        "at most, to which CUDA adds about 0.5 GiB. Host: the process' peak.",
    ]
    if results["reference"]:
        found.append(
            f"PSNR (of RGB) and SSIM (of luma; Wang et al., 2004) are to the picture of "
            f"{results['reference']} with the same seed, medians over the seeds."
        )
    return found


def _about_intervals(results: Mapping[str, Any]) -> list[str]:
    covered = [way["seconds"]["coverage"] for way in results["ways"] if way["seconds"]]
    if not covered:
        return []
    least, level = min(covered), results["level"]
    text = (
        "An interval is of the median, by order statistics: its ends are two of the runs, and no "
        f"distribution is assumed. Such an interval holds the true median in {least:.1%} of cases"
    )
    if least >= level:
        return [text + " or more."]
    return [f"{text}; for {level:.0%} it takes 6 runs, so this is the range of all."]


def interval(spread: Mapping[str, Any]) -> str:
    """The ends of an interval, in seconds."""
    return f"{number(spread['low'])} to {number(spread['high'])}"


def number(value: float) -> str:
    """With three digits that count, or as many as are in front of the point."""
    return f"{value:.{max(0, 2 - _magnitude(value))}f}"


def gib(value: int | None) -> str:
    """Bytes as GiB; empty where there are none."""
    return "" if value is None else f"{value / _GIB:.2f}"


def decibels(way: Mapping[str, Any]) -> str:
    """The median PSNR; ∞ where most pictures are the same."""
    compared = [one for one in way["pictures"] if one["same"] is not None]
    values = [float("inf") if one["same"] else one["psnr"] for one in compared]
    values = [value for value in values if value is not None]
    if not values:
        return ""
    found = median(values)
    return "∞" if found == float("inf") else f"{found:.1f}"


def likeness(way: Mapping[str, Any]) -> str:
    """The median SSIM."""
    values = [one["ssim"] for one in way["pictures"] if one["ssim"] is not None]
    return f"{median(values):.4f}" if values else ""


def _magnitude(value: float) -> int:
    exponent = f"{value:e}".partition("e")[2]
    return max(int(exponent), -2)


def _against_fastest(way: Mapping[str, Any], ways: Sequence[Mapping[str, Any]]) -> str:
    """How many times the fastest way's seconds, and whether the intervals leave that open."""
    measured = [other for other in ways if other["seconds"]]
    fastest = min(measured, key=lambda other: other["seconds"]["median"])
    mine, best = way["seconds"], fastest["seconds"]
    if len(measured) == 1:
        return ""
    if fastest is way:
        return ", the least of all"
    times = f"{mine['median'] / best['median']:.2f} times as long as {fastest['name']}"
    if mine["low"] <= best["high"]:
        return f" ({times}, which the spread does not tell apart)"
    return f" ({times})"
