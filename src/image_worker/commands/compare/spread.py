"""The median of measured values, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of intervals


@dataclass(frozen=True)
class Spread:
    """A median with its interval. coverage: how often such an interval holds the true median."""

    median: float
    low: float
    high: float
    coverage: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """The median of at least one value, and an interval of it that assumes no distribution.

    The interval's ends are two of the values, the k-th from below and from above. It misses the
    true median where fewer than k values lie on one side of it: twice a tail of the binomial
    distribution. The narrowest one is taken that covers at least 95%; five values or fewer have
    none, and then it is all of them, and `coverage` is less.
    """
    ordered, count = sorted(values), len(values)
    k = max((k for k in range(1, count // 2 + 1) if _coverage(count, k) >= LEVEL), default=1)
    return Spread(
        statistics.median(ordered), ordered[k - 1], ordered[-k], _coverage(count, k), count
    )


def _coverage(count: int, k: int) -> float:
    outside = 2 * sum(math.comb(count, below) for below in range(k))
    return max(0.0, float(1 - outside / 2**count))
