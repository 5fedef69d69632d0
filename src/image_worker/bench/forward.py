"""Forwards of the transformer, diffusers' and ours: `python -m image_worker.bench.forward`.

The true architecture with random weights. All ways take turns, a few forwards each, as a job has
them: those of one kind of weights, or of all (`--together`). "rel." is the distance of an output
from the stock module's, with the same weights in float32 and without a LoRA, relative to its
length; "weights" is what they take on the card, "working" what a forward takes beside them, in GiB.
With 140 GB everything is measured; a smaller card leaves out, and says so, first the ways that are
not ours by default, then the stock module, then whole kinds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from image_worker.bench.random_model import CARD, KINDS, random_model, random_row
from image_worker.bench.ways import EXTENTS, Extent, Way, relative, stock, ways_of
from image_worker.model import ranges
from image_worker.model.components import TRANSFORMER
from image_worker.model.transformer import Row
from image_worker.settings import Precision

ROUNDS = 9
FORWARDS = 4  # of one way before the next one's turn: the steps of a job
CASES = ((1024, 1), (1024, 2), (512, 1), (1024, 0), (512, 0))  # side of the result, references
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "4bit")
GIB = 2**30
FLOAT32_GIB, BF16_GIB = 90, 44  # that a forward of the stock module takes
Result = tuple[str | int, ...]  # a line of the table
_COLUMNS = (
    *("result", "references", "batch", "kind", "how"),
    *("weights", "working", "rel.", "ms", "± ms"),
)


def main() -> None:
    """Measures every case in every precision; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--outliers", choices=("inputs", "weights"), help="some channels 20 times the others"
    )
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=KINDS)
    parser.add_argument("--lora", type=int, metavar="RANK", help="ours also with a LoRA beside it")
    parser.add_argument("--together", action="store_true", help="all of these take turns")
    parser.add_argument("--batch", type=int, default=1, help="rows of each forward")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--forwards", type=int, default=FORWARDS, help="of one way in each round")
    parser.add_argument("--max-gib", type=float, help="as if the card had no more")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    cases = [CASES[number] for number in options.cases or range(len(CASES))]
    rows = {case: random_row(*case) for case in cases}
    exact = _exact(rows, options)
    sys.stdout.write(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|\n")
    found = []
    kinds = options.precisions
    for group in [kinds] if options.together else [[kind] for kind in kinds]:
        for result in _as_much_as_fits(group, rows, exact, options):
            found.append(dict(zip(_COLUMNS, result, strict=True)))
            sys.stdout.write("| " + " | ".join(map(str, result)) + " |\n")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(found))


def _exact(rows: dict[Any, Row], options: argparse.Namespace) -> dict[Any, Tensor]:
    """The stock module's velocities, in float32 or as exact as the card has room for."""
    size = torch.cuda.mem_get_info()[1] / GIB
    if options.max_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.max_gib / size))
        size = min(size, options.max_gib)
    if size < BF16_GIB:
        sys.stdout.write("in bf16 the model does not fit: rel. is left out\n")
        return {}
    model, dtype = random_model(outliers=options.outliers), torch.bfloat16
    if size > FLOAT32_GIB:
        model, dtype = model.float(), torch.float32
    else:
        sys.stdout.write("in float32 the model does not fit: rel. is to stock bf16\n")
    return {case: stock(model, [row], dtype)[0] for case, row in rows.items()}


def _as_much_as_fits(
    kinds: Sequence[str],
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
    options: argparse.Namespace,
) -> list[Result]:
    extents = EXTENTS[1:] if len(kinds) > 1 else EXTENTS
    for extent in extents:
        gc.collect()  # the last modules, which hold themselves
        torch.cuda.empty_cache()
        try:
            return _compare(kinds, extent, rows, exact, options)
        except torch.OutOfMemoryError:
            sys.stdout.write(f"{', '.join(kinds)}: the card is too small for {extent}\n")
    sys.stdout.write(f"{', '.join(kinds)}: left out\n")
    return []


def _compare(
    kinds: Sequence[str],
    extent: Extent,
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
    options: argparse.Namespace,
) -> list[Result]:
    ways: list[Way] = []
    shared = None
    for kind in kinds:
        model = random_model(
            kind,
            outliers=options.outliers,
            modulation=torch.device("cpu") if extent == "ours alone" else CARD,
            shared=shared,
            ranges=_ranges(rows, options) if kind == "svdq-ranges" else None,
        )
        shared = shared or model
        ways += ways_of(kind, model, extent, options.lora)
    found = []
    for case, row in rows.items():
        title = f"{', '.join(kinds)}, {case[0]}², {case[1]} references"
        measured = _measure(ways, [row] * options.batch, exact.get(case), options, title)
        for way, cells in zip(ways, measured, strict=True):
            found.append((f"{case[0]}²", case[1], options.batch, way.kind, way.how, *cells))
    return found


def _ranges(rows: dict[Any, Row], options: argparse.Namespace) -> dict[str, Tensor]:
    """Activation ranges, of jobs like those that are measured, but with other numbers."""
    model = random_model(outliers=options.outliers)
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and TRANSFORMER.quantised(name)
    ]
    with ranges.watch(model, names) as recorder:
        for side, references in rows:
            stock(model, [random_row(side, references, seed=2)])
    return recorder.ranges()


def _measure(
    ways: Sequence[Way],
    rows: Sequence[Row],
    exact: Tensor | None,
    options: argparse.Namespace,
    title: str,
) -> list[tuple[str, ...]]:
    """Of each way: GiB of weights and beside them, error, milliseconds and their spread."""
    first = []
    for way in ways:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = way.run(rows)[0]
        working = torch.cuda.max_memory_allocated() - before
        error = "" if exact is None else f"{relative(output, exact):.4f}"
        first.append((f"{way.weights / GIB:.2f}", f"{working / GIB:.2f}", error))
    times: list[list[float]] = [[] for _ in ways]
    for _ in tqdm(range(options.rounds), desc=title, leave=False, disable=None):
        for way, taken in zip(ways, times, strict=True):
            taken.append(timed(functools.partial(way.run, rows), options.forwards))
    return [
        (*cells, *(f"{number:.1f}" for number in median(taken)))
        for cells, taken in zip(first, times, strict=True)
    ]


def median(times: Sequence[float]) -> tuple[float, float]:
    """With half the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def timed(run: Callable[[], Any], forwards: int) -> float:
    """Milliseconds of the card for each of `forwards`, one after the other, from an idle card."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(forwards):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / forwards


if __name__ == "__main__":
    main()
