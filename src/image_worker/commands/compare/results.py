"""What came of a trial, as one JSON object: `results.json`, from which the page is made, too.

    {"complete", "command", "order", "machine", "code", "level", "reference", "kernels",
     "job": {"prompt", "pictures", "options"}, "seeds": [of each run],
     "ways": [{"name", "variables", "loras", "settings", "error": {"type", "message"} or null,
               "start": {"seconds", "steps": [{"name", "seconds"}], "plan", "weights"} or null,
               "first_job", "seconds": spread, "step_seconds": spread, "steps", "size",
               "card", "host", "card_time", "warnings", "against": name or null,
               "pictures": [{"seed", "file", "psnr", "ssim", "same"}]}]}

A spread is {"values", "median", "low", "high", "coverage"}, or null where there is no run. Seconds,
and bytes ("card": reserved by torch, null without one; "host": the process' peak). psnr: dB, null
for the same picture and where there is none to compare with; `file` is relative to the folder.
`card_time` is {"parts": [{"name", "ms", "count"}]} of one picture's kernels by what they do, or
{"problem"}; null where there is none. `against` is whose pictures they are compared with. A way
that failed has the runs before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from image_worker.commands.compare.likeness import pixels_of, psnr, ssim
from image_worker.commands.compare.records import Record
from image_worker.commands.compare.spread import LEVEL, spread
from image_worker.commands.compare.trial import Trial
from image_worker.commands.compare.ways import Way, settings_of
from image_worker.errors import InvalidSettings

Results = dict[str, Any]
REFERENCE = "bf16"


def results(trial: Trial, command: str) -> Results:
    """As far as it has come. command: what to type to have it again."""
    references = {way: _reference(trial, way) for way in trial.ways}
    names = {other.name for other in references.values() if other is not None}
    return {
        "complete": all(not trial.unfinished(way) or _error(trial, way) for way in trial.ways),
        "command": command,
        "order": _order(trial),
        "machine": trial.machine,
        "code": trial.code,
        "level": LEVEL,
        "reference": " or ".join(sorted(names)) or None,
        "kernels": _kernels(trial),
        "job": _job(trial),
        "seeds": list(trial.seeds),
        "ways": [_way(trial, way, references[way]) for way in trial.ways],
    }


def _way(trial: Trial, way: Way, reference: Way | None) -> Results:
    key, runs = trial.key(way), _runs(trial, way)
    start = trial.records.first("start", key)
    try:
        settings = settings_of(way)
    except InvalidSettings:
        settings = {}
    last = runs[-1] if runs else {}
    return {
        "name": way.name,
        "variables": dict(way.variables),
        "loras": [Path(path).name for path in way.loras],
        "settings": settings,
        "error": _error(trial, way),
        "start": start and {name: start[name] for name in ("seconds", "steps", "plan", "weights")},
        "first_job": start and start["first_job"],
        "seconds": _spread([run["seconds"] for run in runs]),
        "step_seconds": _spread([run["timings"]["denoise"] / run["steps"] for run in runs]),
        "steps": last.get("steps"),
        "size": [last["width"], last["height"]] if last else None,
        "card": max((run["card"] for run in runs if run["card"] is not None), default=None),
        "host": max((run["host"] for run in runs), default=None),
        "card_time": _card_time(trial, key),
        "warnings": last.get("warnings", []),
        "against": reference.name if reference else None,
        "pictures": [_picture(trial, way, seed, reference) for seed in _seeds(trial, way)],
    }


def _card_time(trial: Trial, key: str) -> Results | None:
    found = trial.records.first("card_time", key)
    return found and {name: found[name] for name in ("parts", "problem") if name in found}


def _runs(trial: Trial, way: Way) -> list[Record]:
    found = (trial.records.run(trial.key(way), *run) for run in trial.runs())
    return [run for run in found if run is not None]


def _seeds(trial: Trial, way: Way) -> list[int]:
    """Those that there are pictures of, made by runs that count."""
    key = trial.key(way)
    return [
        seed
        for seed in dict.fromkeys(trial.seeds)
        if trial.records.run(key, seed, 0) and trial.picture(way, seed).is_file()
    ]


def _spread(values: Sequence[float]) -> Results | None:
    return {"values": list(values), **asdict(spread(values))} if values else None


def _error(trial: Trial, way: Way) -> Results | None:
    found = trial.records.error(trial.key(way)) if trial.unfinished(way) else None
    return found and {"type": found["type"], "message": found["message"]}


def _reference(trial: Trial, way: Way) -> Way | None:
    """bf16 with the same LoRAs, or the first way with these that has pictures; None: it is it."""
    alike = [other for other in trial.ways if other.loras == way.loras and _seeds(trial, other)]
    exact = [other for other in alike if dict(other.variables) == {"PRECISION_MODE": REFERENCE}]
    chosen = next(iter([*exact, *alike]), None)
    return None if chosen == way else chosen


def _picture(trial: Trial, way: Way, seed: int, reference: Way | None) -> Results:
    path = trial.picture(way, seed)
    found: Results = {"seed": seed, "file": path.relative_to(trial.out).as_posix()}
    found |= {"psnr": None, "ssim": None, "same": None}
    if reference is not None and seed in _seeds(trial, reference):
        other = trial.picture(reference, seed)
        found |= _likeness(path, path.stat().st_mtime_ns, other, other.stat().st_mtime_ns)
    return found


@lru_cache(maxsize=4096)
def _compared(one: Path, _: int, other: Path, __: int) -> tuple[float | None, float | None, bool]:
    first, second = pixels_of(one), pixels_of(other)
    if first.shape != second.shape:
        return None, None, False
    same = bool((first == second).all())
    return None if same else psnr(first, second), ssim(first, second), same


def _likeness(*files: Any) -> Results:
    decibels, likeness, same = _compared(*files)
    return {"psnr": decibels, "ssim": likeness, "same": same}


def _order(trial: Trial) -> str:
    """How ways followed each other, in words."""
    ways = {run["in_turns"] for way in trial.ways for run in _runs(trial, way)}
    if ways == {True}:
        return "All ways were loaded at the same time and took turns, one run each."
    if ways == {False}:
        return (
            "The ways ran one after the other, since memory does not hold all of them or only one "
            "was to be measured: a card that grows hot slows the later ones."
        )
    if ways:
        return "Some runs were made in turns, and others one way after the other."
    return "Nothing has been measured."


def _kernels(trial: Trial) -> Results:
    if trial.machine["card"] is None:
        return {"problem": "no card"}
    key = trial.kernels_key()
    found = trial.records.first("kernels", key) if key else None
    if found is None:
        return {"problem": "not measured yet"}
    return {name: found[name] for name in ("pairs", "problem") if name in found}


def _job(trial: Trial) -> Results:
    """Without its pictures."""
    pictures = [name for name in trial.job if name.startswith("image")]
    listed = trial.job.get("images")
    others = {name: value for name, value in trial.job.items() if name not in (*pictures, "prompt")}
    count = len(listed) if listed is not None else len(pictures)
    return {"prompt": trial.job["prompt"], "pictures": count, "options": others}
