"""The judge: says whether a result is the edit that was asked for, by comparing it with the answer.

An edit passes when all three hold:

    change  what should change did: over the pixels that differ between picture and answer, the
            result is at least 2.5 times nearer to the answer than the unedited picture is
    colour  over the same pixels, no channel of the mean colour is off by more than 0.1 of its range
    kept    everything else stayed: 25 dB PSNR to the answer or better outside of those pixels, and
            over the whole picture where all of it was to change

All pictures are (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MOST_CHANGE_LEFT = 0.4
MOST_COLOUR_OFF = 0.1
LEAST_KEPT = 25.0
MOST_STYLE_LEFT = 0.5

_DIFFERS = 0.04  # a pixel is to change where a channel differs by more than this
_MARGIN = 2  # pixels around those that count with them: edges are soft


@dataclass(frozen=True)
class Verdict:
    """change: the share of the way to the answer that is left, 0 is best, 1 is the input;
    colour: the largest error of a channel's mean; kept: dB."""

    change: float
    colour: float
    kept: float

    @property
    def passed(self) -> bool:
        return (
            self.change <= MOST_CHANGE_LEFT
            and self.colour <= MOST_COLOUR_OFF
            and self.kept >= LEAST_KEPT
        )


def judge(before: Tensor, answers: Tensor, results: Tensor) -> list[Verdict]:
    """One verdict per picture."""
    differs = ((answers - before).abs().amax(1, keepdim=True) > _DIFFERS).float()
    changing = functional.max_pool2d(differs, 2 * _MARGIN + 1, stride=1, padding=_MARGIN)
    left = _rms(results - answers, changing) / _rms(before - answers, changing)
    colours = [_mean(pictures, differs) for pictures in (results, answers)]
    off = (colours[0] - colours[1]).abs().amax(1)
    everything = changing.mean((1, 2, 3), keepdim=True) > 0.98
    staying = torch.where(everything, 1, 1 - changing)
    kept = -20 * torch.log10(_rms(results - answers, staying).clamp(min=1e-5))
    return [
        Verdict(*values) for values in zip(*(x.tolist() for x in (left, off, kept)), strict=True)
    ]


def in_style(answers: Tensor, styled: Tensor, results: Tensor) -> list[bool]:
    """Whether each result has the style that `styled` has and `answers` lacks.

    Over the pixels where these two differ clearly, the result is nearer to `styled` by half.
    """
    differs = ((styled - answers).abs().amax(1, keepdim=True) > 0.2).float()
    left = _rms(results - styled, differs) / _rms(answers - styled, differs)
    return (left <= MOST_STYLE_LEFT).tolist()


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """dB, per picture, capped at 100: (B)."""
    return -10 * torch.log10((first - second).square().mean((1, 2, 3)).clamp(min=1e-10))


def _mean(pictures: Tensor, mask: Tensor) -> Tensor:
    """Mean colour over a mask (B, 1, H, W): (B, 3)."""
    return (pictures * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)


def _rms(difference: Tensor, mask: Tensor) -> Tensor:
    """Over the masked pixels of all channels: (B)."""
    total = (difference.square() * mask).sum((1, 2, 3))
    return (total / (3 * mask.sum((1, 2, 3))).clamp(min=1)).sqrt()
