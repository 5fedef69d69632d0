"""What `compare` computes: the median and how sure it is, and how alike two pictures are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95  # of intervals
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Pixels = NDArray[np.uint8]  # (height, width, 3)
_Plane = NDArray[np.float64]


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


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio over all channels, in dB; infinite where they are the same."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(one: Pixels, other: Pixels) -> float:
    """Structural similarity of the luma, at most 1 (Wang et al., 2004, IEEE TIP 13:4).

    The mean over all windows of 11 by 11 pixels, weighted by a Gaussian of sigma 1.5, of

        (2 mx my + C1) (2 sxy + C2) / ((mx² + my² + C1) (sx² + sy² + C2))

    with their means m, variances s² and covariance sxy; C1 = (0.01 · 255)², C2 = (0.03 · 255)².
    Sides are at least 11. Luma is by ITU-R BT.601.
    """
    x, y = _luma(one), _luma(other)
    mx, my = _smooth(x), _smooth(y)
    vx, vy = _smooth(x * x) - mx * mx, _smooth(y * y) - my * my
    covariance = _smooth(x * y) - mx * my
    above = (2 * mx * my + _C1) * (2 * covariance + _C2)
    below = (mx * mx + my * my + _C1) * (vx + vy + _C2)
    return float(np.mean(above / below))


def _luma(pixels: Pixels) -> _Plane:
    plane: _Plane = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return plane


def _smooth(plane: _Plane) -> _Plane:
    """The weighted mean of each window that lies inside: down the columns, then along the rows."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):
        rows = len(plane) - _WINDOW + 1
        parts = (weight * plane[at : at + rows] for at, weight in enumerate(weights))
        plane = np.sum(list(parts), axis=0).T
    return plane
