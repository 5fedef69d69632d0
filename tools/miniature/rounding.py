"""How far rounding moves pictures: `python -m tools.miniature.rounding`.

Held-out edits of the miniature by Lightning 8, each way of rounding against the same edit with all
weights and numbers in float32. On a CPU, which computes what kernels of cards do by definition.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from image_worker.model.build import build
from image_worker.model.hardware import Hardware
from image_worker.settings import Settings
from tools.miniature import quality
from tools.miniature.quality import Examples
from tools.miniature.score import judge, psnr

SAMPLING = next(sampling for sampling in quality.SAMPLINGS if sampling.name == "Lightning 8")
EXACT = {"PRECISION_MODE": "bf16", "ATTENTION": "bf16", "COMPUTE": "bf16"}


@dataclass(frozen=True)
class Way:
    """environment: what differs from EXACT; dtype: of numbers between the products."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


WAYS = (
    Way("numbers in bf16", dtype=torch.bfloat16),
    Way("attention in int8", {"ATTENTION": "int8"}),
    Way("weights in fp8", {"PRECISION_MODE": "fp8"}),
    Way("weights and products in fp8", {"PRECISION_MODE": "fp8", "COMPUTE": "fp8"}),
    Way("weights in 8bit", {"PRECISION_MODE": "8bit"}),
    Way("weights in 8bit, products in int8", {"PRECISION_MODE": "8bit", "COMPUTE": "int8"}),
    Way("weights in 4bit", {"PRECISION_MODE": "4bit"}),
    Way("weights in 4bit, products in fp8", {"PRECISION_MODE": "4bit", "COMPUTE": "fp8"}),
    Way("weights in 4bit, products in int8", {"PRECISION_MODE": "4bit", "COMPUTE": "int8"}),
    Way(
        "weights in 4bit, products in fp8, attention in int8",
        {"PRECISION_MODE": "4bit", "COMPUTE": "fp8", "ATTENTION": "int8"},
    ),
)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-kind", type=int, default=5, help="edits of each of the 20 kinds")
    examples = quality.make_examples(parser.parse_args().per_kind)
    exact = pictures(Way("float32"), examples)
    sys.stdout.write("| rounded | PSNR, dB: median | lowest tenth | lowest | passed, % |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- |\n")
    for way in WAYS:
        found = pictures(way, examples)
        sys.stdout.write(line(way, found, exact, examples))
        sys.stdout.flush()


def pictures(way: Way, examples: Examples) -> Tensor:
    """The edits of `examples`, (N, 3, side, side) float32."""
    settings = Settings.from_env(EXACT | {"LIGHTNING_STEPS": "8"} | way.environment)
    model = build(settings, quality.MINI, Hardware("CPU"), dtype=way.dtype)
    return quality.edit(model, quality.encode(model, examples), SAMPLING).float()


def line(way: Way, found: Tensor, exact: Tensor, examples: Examples) -> str:
    """The table's."""
    distances = psnr(found, exact)
    passed = [verdict.passed for verdict in judge(examples.before, examples.answers, found)]
    cells = [distances.median(), distances.quantile(0.1), distances.min()]
    numbers = " | ".join(f"{float(cell):.1f}" for cell in cells)
    return f"| {way.name} | {numbers} | {100 * sum(passed) / len(passed):.1f} |\n"


if __name__ == "__main__":
    main()
