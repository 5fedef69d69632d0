"""Plots for `compare`'s page, as inline SVG: a line for each way, its name and figure above it.

They are 360 wide, so that their texts are as large as the page's on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _ROW, _AXIS = 360, 46, 26
_LEFT, _RIGHT = 8, _WIDTH - 8
_TICKS = 4

_Place = Callable[[float], str]  # of a value: how far from the left


@dataclass(frozen=True)
class Line:
    """dots: single values; interval: its ends; mark: the median; bar: from 0; figure: in words.

    parts: of which a bar is made, each in the colour of its place in the list.
    """

    name: str
    figure: str
    dots: Sequence[float] = ()
    interval: tuple[float, float] | None = None
    mark: float | None = None
    bar: float | None = None
    parts: Sequence[float] = ()


def plot(title: str, unit: str, lines: Sequence[Line], *, from_zero: bool = False) -> str:
    """An SVG with a text for those who do not see it; nothing where there are no values."""
    low, high = _range(lines, from_zero)
    if low is None or high is None:
        return ""
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(value: float) -> str:
        return f"{_LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT):.1f}"

    height = _ROW * len(lines) + _AXIS
    told = "; ".join(f"{line.name}: {line.figure}" for line in lines)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(f"{title}. {told}")}">'
    ]
    for tick in ticks:
        x, end = place(tick), height - _AXIS + 4
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{end}"/>')
    for number, line in enumerate(lines):
        parts += _drawn(line, number * _ROW, place)
    parts += _labels(ticks, unit, height, place)
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, top: int, place: _Place) -> list[str]:
    middle = top + 31
    parts = [
        f'<text class="name" x="{_LEFT}" y="{top + 15}">{escape(_short(line.name))}</text>',
        f'<text class="figure" x="{_RIGHT}" y="{top + 15}">{escape(line.figure)}</text>',
    ]
    if line.bar is not None:
        width = float(place(line.bar)) - _LEFT
        parts.append(
            f'<rect class="bar" x="{_LEFT}" y="{middle - 7}" width="{width:.1f}" height="14" '
            'rx="3"/>'
        )
    parts += _stacked(line.parts, middle, place)
    if line.interval is not None:
        x1, x2 = map(place, line.interval)
        parts.append(f'<line class="interval" x1="{x1}" x2="{x2}" y1="{middle}" y2="{middle}"/>')
    parts += [f'<circle class="dot" cx="{place(dot)}" cy="{middle}" r="4"/>' for dot in line.dots]
    if line.mark is not None:
        x = place(line.mark)
        parts.append(
            f'<line class="mark" x1="{x}" x2="{x}" y1="{middle - 10}" y2="{middle + 10}"/>'
        )
    return parts


def _stacked(values: Sequence[float], middle: int, place: _Place) -> list[str]:
    found, start = [], 0.0
    for number, value in enumerate(values):
        x, end = float(place(start)), float(place(start + value))
        found.append(
            f'<rect class="part{number}" x="{x:.1f}" y="{middle - 7}" width="{end - x:.1f}" '
            'height="14"/>'
        )
        start += value
    return found


def _labels(ticks: Sequence[float], unit: str, height: int, place: _Place) -> list[str]:
    parts = []
    for tick in ticks:
        x = float(place(tick))
        anchor = "start" if x < 30 else "end" if x > _WIDTH - 30 else "middle"
        text = f"{tick:g}" + (f" {unit}" if tick == ticks[-1] else "")
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 7}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )
    return parts


def _range(lines: Sequence[Line], from_zero: bool) -> tuple[float | None, float | None]:
    values = [value for line in lines for value in line.dots]
    values += [value for line in lines if line.bar is not None for value in (0.0, line.bar)]
    values += [value for line in lines if line.parts for value in (0.0, sum(line.parts))]
    values += [0.0] if from_zero and values else []
    values = [value for value in values if math.isfinite(value)]
    return (min(values), max(values)) if values else (None, None)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around the range: 1, 2 or 5 times a power of ten apart."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(power * nice for nice in (1, 2, 5, 10) if span / (power * nice) <= _TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
