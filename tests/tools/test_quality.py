"""The miniature that is shipped really edits, and its style LoRA shows where it is merged."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from image_worker.catalog import CATALOG
from image_worker.edit.conditions import Conditions
from tools.miniature import quality, rounding
from tools.miniature.quality import Examples, Sampling
from tools.miniature.score import in_style, judge, psnr

pytestmark = pytest.mark.long


@functools.cache
def examples() -> Examples:
    return quality.make_examples(1)


@functools.cache
def encoded() -> list[Conditions]:
    """The same for all samplings: no LoRA changes what encodes."""
    return quality.encode(quality.load("bf16", quality.REFERENCE), examples())


@functools.cache
def results(sampling: Sampling) -> Tensor:
    return quality.edit(quality.load("bf16", sampling), encoded(), sampling)


# Guidance takes twice as long, and is compared with upstream's elsewhere.
SAMPLINGS = [s for s in quality.SAMPLINGS if not s.style and s.steps < 40 and s.scale == 1]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_held_out_edits_pass(sampling: Sampling) -> None:
    """9 in 10 of one of each kind; `make bench-quality` measures the share."""
    found = judge(examples().before, examples().answers, results(sampling))
    assert sum(verdict.passed for verdict in found) >= 0.9 * len(found)


def test_the_style_shows_only_with_its_lora() -> None:
    given = examples()
    with_it, without = (s for s in quality.SAMPLINGS if s.lightning == 8)
    if without.style:
        with_it, without = without, with_it
    assert sum(in_style(given.answers, given.styled, results(with_it))) >= 19
    assert not any(in_style(given.answers, given.styled, results(without)))


def test_the_report_has_a_line_per_row_and_kind() -> None:
    sampling = quality.SAMPLINGS[-2]
    row = quality.row("bf16", sampling, examples(), examples().answers, None, 0.1)
    assert row.passed == row.two_pictures == 100 and row.in_style == 0
    table = quality.table([row, row])
    assert len(table.splitlines()) == 2 + 2 + 1 + 2 + 20
    assert CATALOG["mini"].cfg_scale == 1
    torch.testing.assert_close(row.to_answer, 100.0)


def every_other(given: Examples) -> Examples:
    """Half of the kinds."""
    fields = dataclasses.fields(given)
    return Examples(**{field.name: getattr(given, field.name)[::2] for field in fields})


def test_rounding_moves_pictures_by_as_much_as_it_should() -> None:
    given = every_other(examples())
    exact = rounding.pictures(rounding.Way("float32"), given)
    ways = {way.name: way for way in rounding.WAYS}
    weights, both = (
        rounding.pictures(ways[name], given)
        for name in ("weights in 4bit", "weights in 4bit, products in fp8")
    )
    line = rounding.line(ways["weights in 4bit"], exact, exact, given)
    assert line.startswith("| weights in 4bit | 100.0 | 100.0 |")
    assert 34 <= psnr(weights, exact).median() <= 45
    assert 30 <= psnr(both, weights).median() <= 60
