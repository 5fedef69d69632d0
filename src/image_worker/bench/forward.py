"""Forwards of the transformer, diffusers' and ours: `python -m image_worker.bench.forward`.

The true architecture with random weights. All ways take turns, a few forwards each, as a job has
them. "rel." is the distance of an output from the stock module's, with the same weights in float32,
relative to its length. With 140 GB everything is measured; a smaller card leaves out, and says so,
first the ways that are not ours by default, then the stock module, then whole precisions.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from image_worker.bench import ggml
from image_worker.bench.random_model import CARD, random_model, random_row
from image_worker.bench.stock_nf4 import use_bitsandbytes
from image_worker.compute import Compute, automatic, possible
from image_worker.model.attention import Int8
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from image_worker.settings import Precision

ROUNDS = 9
FORWARDS = 4  # of one way before the next one's turn: the steps of a job
CASES = ((1024, 1), (1024, 2), (512, 1), (1024, 0), (512, 0))  # side of the result, references
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "4bit")
GIB = 2**30
FLOAT32_GIB, BF16_GIB = 90, 44  # that a forward of the stock module takes
Way = tuple[Compute, bool]  # what ours multiplies in, and whether it attends in int8
Run = Callable[[], Sequence[Tensor] | Tensor]  # velocities of each row
Result = tuple[str | int, ...]  # a line of the table
Extent = Literal["all ways", "stock and ours", "ours alone"]
EXTENTS: tuple[Extent, ...] = ("all ways", "stock and ours", "ours alone")
_COLUMNS = ("result", "references", "batch", "weights", "how", "ms", "± ms", "rel.")


def main() -> None:
    """Measures every case in every precision; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outliers", action="store_true", help="some channels 20 times the others")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument(
        "--precisions", nargs="+", default=PRECISIONS, choices=(*get_args(Precision), *ggml.KINDS)
    )
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
    for precision in options.precisions:
        for result in _as_much_as_fits(precision, rows, exact, options):
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


@torch.inference_mode()
def stock(model: Any, rows: Sequence[Row], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Velocities by diffusers' module, (rows, tokens, channels), of rows that are all alike."""
    row, batch = rows[0], len(rows)
    _, height, width = row.shapes[0]
    timestep = torch.tensor([1000 * row.timestep] * batch, device=CARD).to(torch.bfloat16) / 1000
    output = model(
        hidden_states=torch.stack([row.image.to(dtype) for row in rows]),
        encoder_hidden_states=torch.stack([row.text.to(dtype) for row in rows]),
        timestep=timestep.to(dtype),
        img_shapes=[list(row.shapes)] * batch,
        return_dict=False,
    )[0]
    return output[:, : height * width]  # type: ignore[no-any-return]


def ours(model: Any, compute: Compute = "bf16", int8_attention: bool = False) -> Transformer:
    """What serves, of the weights of `model`, which keeps them; those of modulation are shared."""
    layers = [
        layer for block in model.transformer_blocks for layer in (block.img_mod, block.txt_mod)
    ]
    taken_apart = copy.deepcopy(model, memo={id(layer): layer for layer in layers})
    return _transformer(taken_apart, (compute, int8_attention))


def _transformer(model: Any, way: Way) -> Transformer:
    compute, int8_attention = way
    attention = Int8(CARD) if int8_attention else None
    round_to = ROUND_TO[compute]
    made = Transformer(model, CARD, torch.bfloat16, round_to=round_to, attention=attention)
    return made.eval()


def _as_much_as_fits(
    precision: str,
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
    options: argparse.Namespace,
) -> list[Result]:
    for extent in EXTENTS:
        gc.collect()  # the last modules, which hold themselves
        torch.cuda.empty_cache()
        try:
            return _compare(precision, extent, rows, exact, options)
        except torch.OutOfMemoryError:
            sys.stdout.write(f"{precision}: the card is too small for {extent}\n")
    sys.stdout.write(f"{precision} is left out\n")
    return []


def _compare(
    precision: str,
    extent: Extent,
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
    options: argparse.Namespace,
) -> list[Result]:
    ways = _ways(precision, torch.cuda.get_device_capability())
    alone = extent == "ours alone"
    aside = torch.device("cpu") if alone else CARD
    model = random_model(precision, outliers=options.outliers, modulation=aside)
    if alone:
        served = {ways[0]: _transformer(model, ways[0])}
    else:
        served = {way: ours(model, *way) for way in (ways if extent == "all ways" else ways[:1])}
        use_bitsandbytes(model.transformer_blocks, torch.bfloat16)  # as stock has them
        ggml.use_diffusers(model.transformer_blocks, torch.bfloat16)
    results = []
    for case, row in rows.items():
        given = [row] * options.batch
        runs: dict[str, Run] = {
            f"ours, {compute} products, {'int8' if int8 else 'bf16'} attention": functools.partial(
                velocities, transformer, given
            )
            for (compute, int8), transformer in served.items()
        }
        if precision not in ("fp8", "svdq") and not alone:  # diffusers has none of its own
            runs = {"stock": functools.partial(stock, model, given)} | runs
        title = f"{precision}, {case[0]}², {case[1]} references"
        for name, cells in _measure(runs, exact.get(case), options, title).items():
            results.append((f"{case[0]}²", case[1], options.batch, precision, name, *cells))
    return results


def _ways(precision: str, capability: tuple[int, int]) -> list[Way]:
    """What ours multiplies in, and whether it attends in int8; first what it does by default."""
    like = cast("Precision", "4bit" if precision in ggml.KINDS else precision)
    hopper = capability == (9, 0)
    compute = automatic(like, capability, bf16=True)
    ways: list[Way] = [(compute, True), (compute, False)] if hopper else [(compute, False)]
    if compute != "int8" and "int8" in possible(like, capability, bf16=True):
        ways.append(("int8", hopper))
    return ways


def _measure(
    runs: dict[str, Run], exact: Tensor | None, options: argparse.Namespace, title: str
) -> dict[str, tuple[str, ...]]:
    """Of each run: milliseconds of a forward, their spread, its error; in turns."""
    errors = {
        name: "" if exact is None else f"{relative(run()[0], exact):.4f}"
        for name, run in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(options.rounds), desc=title, leave=False, disable=None):
        for name, run in runs.items():
            times[name].append(timed(run, options.forwards))
    return {
        name: (*(f"{number:.1f}" for number in median(taken)), errors[name])
        for name, taken in times.items()
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the difference over that of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())


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
