"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Pixels = NDArray[np.uint8]  # (height, width, 3)
_Plane = NDArray[np.float64]


def pixels_of(path: Path) -> Pixels:
    """A picture's file as RGB."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


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
