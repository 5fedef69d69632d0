"""A weight taken apart as SVDQuant does it (Li et al., 2024): smoothed, a low-rank part, and int4.

The largest numbers of a weight, which cost all their neighbours' precision, are nearly all in its
first singular vectors. Without them what is left is alike everywhere, and int4 is enough for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # weights of a row that share a scale
# Of the low-rank part fitted to what int4 leaves, and int4 to what that leaves: twice as many gain
# another 3%, and half as many lose 10, as measured on the miniature.
_ROUNDS = 4
_SPARE = 8  # vectors beyond the rank, and turns: so that the last of the rank are right, too
_TURNS = 2
_EXACT = 256  # rows or columns up to which singular vectors are computed as such
# Of scales, relative to that with which a group's largest number is code -8: smaller ones cut it
# off, and are finer for all others.
_SCALES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
# Of smoothing by activations, as in SmoothQuant (Xiao et al., 2022, equation 4). That takes their
# largest values, since it rounds them; here weights alone are, and what counts is the mean square.
# Of eight layers of the miniature weaker ones were best for none.
_STRENGTHS = (0.5, 0.75, 1.0)
_LEAST_RANGE = 1e-3  # of a channel, relative to the largest
_PIECE = 1024  # rows that are rounded at a time


@dataclass(frozen=True)
class Parts:
    """As `SvdqWeight` has them, of one layer: the factors and scales in bf16."""

    codes: Tensor
    scales: Tensor
    inverse: Tensor
    down: Tensor
    up: Tensor
    error: float


def decompose(weight: Tensor, rank: int, ranges: Tensor | None = None) -> Parts:
    """Takes a weight (rows, columns) apart, on its device.

    ranges (columns): how large inputs are, each channel's root mean square; zeros throughout, of a
    layer that saw none, count as None. With them, the smoothing is the one of three by which the
    layer's result is nearest; without them there is none. Parts.error: the sum of squares of
    differences, times ranges, if there are any.
    """
    if ranges is not None and not (ranges.any() and weight.any()):
        ranges = None  # there is nothing to be smoothed
    weight = weight.float()
    smooth = weight.new_ones(weight.shape[1])
    if ranges is not None:
        ranges = ranges.to(weight).clamp(min=_LEAST_RANGE * ranges.max().item())
        found = [_smoothing(weight, ranges, strength) for strength in _STRENGTHS]
        errors = [_decompose(weight, one, rank, ranges, rounds=1).error for one in found]
        smooth = found[errors.index(min(errors))]
    return _decompose(weight, smooth, rank, ranges, rounds=_ROUNDS)


def _smoothing(weight: Tensor, ranges: Tensor, strength: float) -> Tensor:
    """What inputs are divided by, around 1."""
    largest = weight.abs().amax(dim=0)
    largest = largest.clamp(min=_LEAST_RANGE * largest.max().item())
    found = ranges.log() * strength - largest.log() * (1 - strength)
    return (found - found.mean()).exp()


def _decompose(
    weight: Tensor, smooth: Tensor, rank: int, ranges: Tensor | None, rounds: int
) -> Parts:
    """Rounds after the first count where they make it better."""
    inverse = 1 / smooth
    importance = inverse if ranges is None else inverse * ranges
    smoothed = weight if ranges is None else weight * smooth
    rest = torch.zeros_like(smoothed)
    best: Parts | None = None
    for _ in range(rounds):
        up, down = (part.bfloat16() for part in low_rank(smoothed.sub(rest), rank))
        down = (down.float() * inverse).bfloat16()
        # What these leave, as they are rounded.
        torch.addmm(smoothed, up.float(), down.float() * smooth, alpha=-1, out=rest)
        codes, scales, error = _round(rest, importance)
        if best is not None and error >= best.error:
            break
        best = Parts(codes, scales, inverse, down, up, error)
    assert best is not None
    return best


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product nearest to a matrix, (rows, rank) and (rank, columns).

    Of large ones by subspace iteration (Halko et al., 2011, algorithm 4.4), with random numbers
    that are always the same.
    """
    rows, columns = matrix.shape
    if min(rows, columns) <= _EXACT:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]
    generator = torch.Generator(matrix.device).manual_seed(0)
    sketch = torch.randn(columns, rank + _SPARE, generator=generator, device=matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(_TURNS):
        basis = torch.linalg.qr(matrix.t() @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    seen = basis.t() @ matrix
    # Its singular vectors on the left, the last of which are the largest.
    turn = torch.linalg.eigh(seen @ seen.t())[1][:, -rank:]
    return basis @ turn, turn.t() @ seen


def _round(rest: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, float]:
    """Codes, scales, and the sum of squares of errors times importance, (columns).

    rest (rows, columns): is replaced by what these stand for.
    """
    codes, scales, error = [], [], 0.0
    weights = importance.square().view(-1, GROUP)
    for piece in torch.split(rest, _PIECE):
        groups = piece.view(len(piece), -1, GROUP)
        scale = _best_scales(groups, weights)
        code = _codes(groups, scale)
        values = code * scale[:, :, None]
        error += ((groups - values).square_() * weights).sum().item()
        groups.copy_(values)
        scales.append(scale.bfloat16())
        pairs = code.to(torch.int8).view(torch.uint8).view(len(piece), -1, 2) & 15
        codes.append(pairs[:, :, 0] | pairs[:, :, 1] << 4)
    return torch.cat(codes), torch.cat(scales), error


def _best_scales(groups: Tensor, weights: Tensor) -> Tensor:
    """(rows, groups) float32, as bf16 has them, of groups (rows, groups, 64)."""
    at = groups.abs().argmax(dim=2, keepdim=True)
    whole = groups.gather(2, at)[:, :, 0] / -8
    best = errors = None
    for relative in _SCALES:
        scale = (whole * relative).bfloat16().float()
        error = (groups - _codes(groups, scale) * scale[:, :, None]).square_()
        error = error.mul_(weights).sum(dim=2)
        if best is None or errors is None:
            best, errors = scale, error
            continue
        best = torch.where(error < errors, scale, best)
        errors = torch.minimum(error, errors)
    assert best is not None
    return best


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    """-8 to 7, as float32. A group of zeros has any scale."""
    safe = torch.where(scale == 0, 1, scale)
    return (groups / safe[:, :, None]).round_().clamp_(-8, 7)
