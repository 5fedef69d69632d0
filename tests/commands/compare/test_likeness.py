"""PSNR and SSIM, against values that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from image_worker.commands.compare.likeness import psnr, ssim


def flat(level: int) -> np.ndarray:
    return np.full((16, 20, 3), level, np.uint8)


def test_psnr() -> None:
    assert psnr(flat(100), flat(100)) == math.inf
    assert psnr(flat(100), flat(110)) == pytest.approx(20 * math.log10(25.5))
    assert psnr(flat(0), flat(255)) == pytest.approx(0)


def test_ssim_of_flat_pictures_is_that_of_their_means() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(flat(100), flat(150)) == pytest.approx(expected)
    assert ssim(flat(7), flat(7)) == pytest.approx(1)


def test_ssim_is_the_formula_in_one_window() -> None:
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 256, (11, 11, 1), dtype=np.uint8) for _ in range(2))
    x, y = (grey[..., 0].astype(float) for grey in (one, other))
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    vxy = (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    repeated = (np.repeat(grey, 3, axis=2) for grey in (one, other))
    assert ssim(*repeated) == pytest.approx(expected)


def test_ssim_falls_with_noise_and_has_no_order() -> None:
    random = np.random.default_rng(1)
    picture = random.integers(60, 196, (40, 30, 3), dtype=np.uint8)
    noise = [
        np.clip(picture + random.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)
        for sigma in (5, 20, 60)
    ]
    found = [ssim(picture, noisy) for noisy in noise]
    assert 1 > found[0] > found[1] > found[2] > 0
    assert ssim(noise[1], picture) == pytest.approx(found[1])
