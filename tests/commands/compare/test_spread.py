"""Medians and their intervals, against values that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from image_worker.commands.compare.spread import spread


# Tables of order statistics (Conover, Practical Nonparametric Statistics): for n values the k-th
# from either side, and the coverage by the binomial distribution.
@pytest.mark.parametrize(
    ("count", "k", "coverage"),
    [(5, 1, 0.9375), (6, 1, 0.96875), (9, 2, 0.9609), (10, 2, 0.9785), (20, 6, 0.9586)],
)
def test_intervals_are_those_of_the_tables(count: int, k: int, coverage: float) -> None:
    values = [float(number) for number in range(1, count + 1)]
    found = spread(values[::-1])
    assert (found.low, found.high) == (k, count + 1 - k)
    assert found.median == (count + 1) / 2
    assert found.coverage == pytest.approx(coverage, abs=5e-5)


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    found = [spread(random.exponential(size=9).tolist()) for _ in range(2000)]
    held = sum(one.low <= math.log(2) <= one.high for one in found) / len(found)
    assert held == pytest.approx(found[0].coverage, abs=0.015)


def test_one_value_is_its_own_interval() -> None:
    found = spread([3.0])
    assert (found.median, found.low, found.high, found.coverage) == (3, 3, 3, 0)
