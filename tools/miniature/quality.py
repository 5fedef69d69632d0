"""How many held-out edits the miniature passes, per precision and sampler: `make bench-quality`.

Beside `PRECISION_MODE`'s, the transformer can come from a file of another program (`stored.py`).

The edits run through what serves: `image_worker`'s build, conditions, denoising and decoding. Runs
on a card or a CPU; writes its tables, and the failed edits as a picture, to a folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from image_worker.catalog import CATALOG
from image_worker.edit import conditions
from image_worker.edit.conditions import Conditions
from image_worker.edit.decode import decode
from image_worker.edit.denoise import denoise, start
from image_worker.model.build import Model, build
from image_worker.model.hardware import detect_hardware
from image_worker.settings import Settings
from tools.miniature import stored
from tools.miniature.edits import TWO_PICTURES, Edit, held_out_edits
from tools.miniature.render import draw, pack, pictures_of, to_image, to_picture
from tools.miniature.scenes import SIDE
from tools.miniature.score import Verdict, in_style, judge, psnr
from tools.miniature.sheet import save_sheet

MINI = CATALOG["mini"]
STYLE = Path(MINI.repo) / "loras" / "miniature-outlined-style-bf16.safetensors"
PRECISIONS = ("bf16", "8bit", "4bit")
ALL = ("bf16", "fp8", "8bit", "svdq", "4bit", *stored.KINDS)


@dataclass(frozen=True)
class Sampling:
    """lightning: which LoRA, None for none; scale: of classifier-free guidance."""

    name: str
    lightning: int | None
    steps: int
    scale: float = 1.0
    style: bool = False


REFERENCE = Sampling("40 steps", None, 40)
SAMPLINGS = (
    REFERENCE,
    Sampling("20 steps", None, 20),
    Sampling("20 steps, guidance 2", None, 20, 2.0),
    Sampling("4 steps without LoRA", None, 4),
    Sampling("2 steps without LoRA", None, 2),
    Sampling("Lightning 8", 8, 8),
    Sampling("Lightning 4", 4, 4),
    Sampling("Lightning 4 in 2 steps", 4, 2),
    Sampling("Lightning 8 and style", 8, 8, style=True),
)
QUANTISED = ("20 steps", "Lightning 8", "Lightning 4")


@dataclass(frozen=True)
class Examples:
    """Held-out edits with their pictures, (N, 3, SIDE, SIDE) each, and a second one or None."""

    edits: list[Edit]
    before: Tensor
    answers: Tensor
    styled: Tensor
    references: list[Tensor | None]


@dataclass(frozen=True)
class Row:
    """One line of the table. Shares in percent, PSNR as medians in dB, seconds per edit."""

    precision: str
    sampling: str
    passed: float
    two_pictures: float
    in_style: float
    to_answer: float
    to_reference: float | None
    seconds: float
    by_kind: dict[str, float]
    each: list[bool]  # whether it passed, edit by edit


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the tables and pictures go")
    parser.add_argument("--per-kind", type=int, default=30, help="edits of each of the 20 kinds")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=ALL)
    parser.add_argument("--attention", default="auto", choices=("auto", "bf16", "int8"))
    parser.add_argument("--compute", default="auto", choices=("auto", "bf16", "fp8", "int8"))
    names = [sampling.name for sampling in SAMPLINGS]
    parser.add_argument("--samplings", nargs="+", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    examples = make_examples(options.per_kind)
    rows: list[Row] = []
    reference: Tensor | None = None
    encoded: dict[str, list[Conditions]] = {}
    for precision in options.precisions:
        of_text = "bf16" if precision in stored.KINDS else precision
        for sampling in SAMPLINGS:
            if precision != "bf16" and sampling.name not in QUANTISED:
                continue
            if sampling.name not in options.samplings:
                continue
            model = load(precision, sampling, options.attention, options.compute, options.folder)
            if of_text not in encoded:
                encoded[of_text] = encode(model, examples)
            clock = time.perf_counter()
            results = edit(model, encoded[of_text], sampling)
            seconds = (time.perf_counter() - clock) / len(results)
            if precision == "bf16" and sampling is REFERENCE:
                reference = results
            rows.append(row(precision, sampling, examples, results, reference, seconds))
            print(_line(rows[-1], rows), flush=True)
            if sampling.name == "Lightning 8":
                _save_failures(examples, results, options.folder / f"failures-{precision}.png")
    (options.folder / "quality.md").write_text(table(rows))
    (options.folder / "quality.json").write_text(json.dumps([asdict(row) for row in rows]))
    print("\n" + table(rows))


def make_examples(per_kind: int) -> Examples:
    """The held-out edits, drawn."""
    return drawn(held_out_edits(per_kind))


def drawn(edits: list[Edit]) -> Examples:
    """Edits with their pictures."""
    before, answers, styled = pictures_of(edits)
    references = [
        draw(torch.from_numpy(pack([e.reference])))[0] if e.reference else None for e in edits
    ]
    return Examples(edits, before, answers, styled, references)


def load(
    precision: str,
    sampling: Sampling,
    attention: str = "auto",
    compute: str = "auto",
    folder: Path = Path(),
) -> Model:
    """precision: of `ALL`; folder: for files, from which the model reads as long as it serves."""
    variables = {
        "ATTENTION": attention,
        "COMPUTE": compute,
        "PRECISION_MODE": precision,
        "USE_LIGHTNING_LORA": str(int(sampling.lightning is not None)),
        "LIGHTNING_STEPS": str(sampling.lightning or 8),
    }
    loras = [STYLE] if sampling.style else []
    if precision in stored.KINDS:
        path = stored.write(precision, folder, sampling.lightning)
        steps = str(sampling.lightning or 0)
        variables |= {"CHECKPOINT": str(path), "CHECKPOINT_LIGHTNING": steps}
        variables["PRECISION_MODE"] = "bf16"  # of the text encoder
    settings = Settings.from_env(variables)
    return build(settings, MINI, detect_hardware(settings), loras=loras)


def encode(model: Model, examples: Examples) -> list[Conditions]:
    """Every edit's conditions, with those for guidance."""
    found = []
    parts = zip(examples.edits, examples.before, examples.references, strict=True)
    for example, before, reference in tqdm(parts, "encoding", len(examples.edits), leave=False):
        shown = [before] if reference is None else [before, reference]
        images = [to_image(picture) for picture in shown]
        found.append(conditions.encode(model, example.instruction, " ", images))
    return found


def edit(model: Model, encoded: Sequence[Conditions], sampling: Sampling) -> Tensor:
    """The edited pictures (N, 3, SIDE, SIDE), each from the seed of its number."""
    size, together = (SIDE, SIDE), 200 if model.device.type == "cuda" else 20
    pictures = [
        start(model, given, size, seed=seed, steps=sampling.steps, cfg_scale=sampling.scale)
        for seed, given in enumerate(encoded)
    ]
    for first in tqdm(range(0, len(pictures), together), sampling.name, leave=False):
        denoise(model, pictures[first : first + together])
    return torch.stack([to_picture(decode(model, picture)) for picture in pictures])


def row(
    precision: str,
    sampling: Sampling,
    examples: Examples,
    results: Tensor,
    reference: Tensor | None,
    seconds: float,
) -> Row:
    wanted = examples.styled if sampling.style else examples.answers
    verdicts = judge(examples.before, wanted, results)
    by_kind: dict[str, list[Verdict]] = defaultdict(list)
    for example, verdict in zip(examples.edits, verdicts, strict=True):
        by_kind[example.kind].append(verdict)
    styled = in_style(examples.answers, examples.styled, results)
    return Row(
        precision,
        sampling.name,
        passed=_share(verdicts),
        two_pictures=_share([v for kind in TWO_PICTURES for v in by_kind[kind]]),
        in_style=100 * sum(styled) / len(styled),
        to_answer=psnr(results, wanted).median().item(),
        to_reference=None if reference is None else psnr(results, reference).median().item(),
        seconds=seconds,
        by_kind={kind: _share(found) for kind, found in by_kind.items()},
        each=[verdict.passed for verdict in verdicts],
    )


def _share(verdicts: Sequence[Verdict]) -> float:
    return 100 * sum(verdict.passed for verdict in verdicts) / len(verdicts)


def table(rows: Sequence[Row]) -> str:
    """All rows, then all kinds, as Markdown."""
    lines = [
        "| precision | sampler | passed, % | more than bf16 | two pictures, % | in the style, % "
        "| PSNR to the answer, dB | PSNR to bf16, 40 steps, dB | s per edit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row, rows) for row in rows),
        "",
        "| kind | " + " | ".join(f"{row.precision}, {row.sampling}" for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for kind in rows[0].by_kind:
        shares = " | ".join(f"{row.by_kind[kind]:.0f}" for row in rows)
        lines.append(f"| {kind} | {shares} |")
    return "\n".join(lines) + "\n"


def _line(row: Row, rows: Sequence[Row]) -> str:
    to_reference: Any = "" if row.to_reference is None else f"{row.to_reference:.1f}"
    more = next((_more(row, one) for one in rows if _is_bf16_of(row, one)), "")
    return (
        f"| `{row.precision}` | {row.sampling} | {row.passed:.1f} | {more} |"
        f" {row.two_pictures:.1f} | {row.in_style:.1f} | {row.to_answer:.1f} | {to_reference} |"
        f" {row.seconds:.3f} |"
    )


def _is_bf16_of(row: Row, other: Row) -> bool:
    return row is not other and (other.precision, other.sampling) == ("bf16", row.sampling)


def _more(row: Row, other: Row) -> str:
    """In points, with the 95% interval of a mean of paired differences."""
    pairs = zip(row.each, other.each, strict=True)
    differences = torch.tensor([float(mine) - float(theirs) for mine, theirs in pairs])
    interval = 196 * differences.std().item() / len(differences) ** 0.5
    return f"{100 * differences.mean().item():+.1f} ± {interval:.1f}"


def _save_failures(examples: Examples, results: Tensor, path: Path) -> None:
    """Every failed edit: shown, (reference,) answer, result."""
    cells = []
    verdicts = judge(examples.before, examples.answers, results)
    for index, verdict in enumerate(verdicts):
        if not verdict.passed:
            second = examples.references[index]
            shown = [examples.before[index], examples.answers[index], results[index]]
            if second is not None:
                shown.insert(1, second)
            cells.append((examples.edits[index].instruction, shown))
    if cells:
        save_sheet([cells[first : first + 4] for first in range(0, len(cells), 4)], path)


if __name__ == "__main__":
    main()
