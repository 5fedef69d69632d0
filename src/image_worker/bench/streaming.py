"""Forwards whose weights pass through the card: `python -m image_worker.bench.streaming`.

The true architecture with random weights, 1024² with one reference, all ways in turns. "stays" is
how many of the sixty blocks stay on the card; "copy" is how long the weights of one forward take to
arrive with nothing to hide behind. In bf16, diffusers' streamed group offload takes part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from image_worker.bench.forward import GIB, timed
from image_worker.bench.random_model import CARD, random_model, random_row
from image_worker.bench.ways import ours, stock
from image_worker.compute import automatic
from image_worker.model.packed import Layout, slots
from image_worker.model.placement import RESERVE, which_pass
from image_worker.model.stream import Held
from image_worker.model.transformer import Transformer, velocities
from image_worker.settings import Precision

STOCK_GIB = 3.0  # of the limit, for diffusers' way beside ours
_COLUMNS = ("weights", "how", "stays", "copied, GB", "copy, ms", "forward, ms", "± ms")


def main() -> None:
    """Measures; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="4bit", choices=get_args(Precision))
    parser.add_argument("--gib", type=float, nargs="+", default=[4.0], help="for ours, each")
    parser.add_argument("--resident", action="store_true", help="beside it, one whose blocks stay")
    parser.add_argument("--stock", action="store_true", help="beside it, diffusers' group offload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", action="store_true", help="the process' memory to the largest")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    results = measure(options)
    sys.stdout.write(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|\n")
    for result in results:
        sys.stdout.write("| " + " | ".join(map(str, result)) + " |\n")
    if options.json:
        found = [dict(zip(_COLUMNS, result, strict=True)) for result in results]
        options.json.write_text(json.dumps(found))


@torch.inference_mode()
def measure(options: argparse.Namespace) -> list[tuple[Any, ...]]:
    """Lines of the table."""
    row = random_row(1024, 1)
    model = random_model(options.precision)
    capability = torch.cuda.get_device_capability()
    compute = automatic(options.precision, capability, bf16=True)
    served: dict[str, Transformer] = {}
    for gib in ([None] if options.resident else []) + options.gib:
        transformer = ours(model, compute, capability == (9, 0))
        if gib is not None:
            stream(transformer, gib - (STOCK_GIB if options.stock else 0))
        velocities(transformer, [row])  # tables of modulation, and kernels
        served["ours" if gib is None else f"ours, {gib:g} GiB"] = transformer
    ways: dict[str, Callable[[], Any]] = {
        name: partial(velocities, transformer, [row]) for name, transformer in served.items()
    }
    if options.stock:
        ways = {"diffusers, group offload": _group_offload(model, row), **ways}
    del model
    torch.cuda.empty_cache()
    if options.limit:
        total = torch.cuda.mem_get_info()[1] / GIB
        torch.cuda.set_per_process_memory_fraction(max(options.gib) / total)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(1 + options.rounds), disable=None):
        for name, way in ways.items():
            took = timed(way, forwards=4)
            if number:  # after a round to warm up
                times[name].append(took)
    return [(options.precision, name, *_line(served.get(name), times[name])) for name in ways]


def stream(transformer: Transformer, gib: float) -> None:
    """Has blocks pass through the card, so many that the transformer takes so much of it."""
    blocks = transformer.blocks
    size = Layout.of(slots(blocks[0])).size
    work = 24 * transformer.width * 10_240
    room = int(gib * GIB) - RESERVE - work
    found = which_pass({"blocks": [size] * len(blocks)}, room)["blocks"]
    blocks.stream({n: Held.of(list(slots(blocks[n])), CARD) for n in found}, CARD)


def _group_offload(model: Any, row: Any) -> Callable[[], Any]:
    model.to("cpu")
    torch.cuda.empty_cache()
    model.enable_group_offload(
        onload_device=CARD,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    return partial(stock, model, [row])


def _line(transformer: Transformer | None, times: Sequence[float]) -> tuple[Any, ...]:
    low, middle, high = statistics.quantiles(times, n=4)
    forward = (f"{middle:.1f}", f"{(high - low) / 2:.1f}")
    if transformer is None:
        return ("0", "", "", *forward)
    blocks = transformer.blocks
    size = Layout.of(slots(blocks[0])).size * len(blocks.away)

    def copy() -> None:
        for _ in blocks.in_turn():
            pass

    copied = f"{timed(copy, forwards=4):.1f}" if blocks.away else ""
    return (len(blocks) - len(blocks.away), f"{size / 1e9:.1f}", copied, *forward)


if __name__ == "__main__":
    main()
