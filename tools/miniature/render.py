"""Draws scenes: signed distances, anti-aliased, many scenes at once, on the CPU or a card.

A scene is packed into a row of numbers first (`pack`), which is cheap to send between processes.
The shapes' distance functions are the standard ones of two-dimensional graphics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tools.miniature.edits import FILTERS, Edit
from tools.miniature.scenes import FILLS, GROUNDS, SHAPES, SIDE, Scene, colour

MOST_THINGS, MOST_SPECKS = 5, 8
_GROUND, _THING, _SPECK = 9, 12, 7  # numbers per ground, thing and speck
NUMBERS = _GROUND + MOST_THINGS * _THING + MOST_SPECKS * _SPECK
OUTLINE = 2.0  # half the width of an outline, in pixels


def pack(scenes: Sequence[Scene]) -> np.ndarray:
    """(scenes, NUMBERS) float32. Absent things and specks have radius 0 and shape -1."""
    rows = np.zeros((len(scenes), NUMBERS), np.float32)
    for row, scene in zip(rows, scenes, strict=True):
        ground = scene.ground
        row[:_GROUND] = (
            GROUNDS.index(ground.kind),
            *ground.first,
            *ground.second,
            ground.across,
            ground.period,
        )
        things, specks = _parts(row)
        things[:, 0] = -1
        specks[:, 0] = -1000  # outside of the picture
        for cells, thing in zip(things, scene.things, strict=False):
            cells[:] = (
                SHAPES.index(thing.shape),
                *colour(thing.colour),
                thing.x,
                thing.y,
                thing.radius,
                FILLS.index(thing.fill),
                thing.outline is not None,
                *(colour(thing.outline) if thing.outline else (0, 0, 0)),
            )
        for cells, speck in zip(specks, scene.specks, strict=False):
            cells[:] = (speck.x, speck.y, speck.length, speck.angle, *speck.colour)
    return rows


def _parts(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    things, specks = np.split(row[_GROUND:], [MOST_THINGS * _THING])
    return things.reshape(MOST_THINGS, _THING), specks.reshape(MOST_SPECKS, _SPECK)


def draw(rows: Tensor) -> Tensor:
    """Packed scenes (B, NUMBERS) to pictures (B, 3, SIDE, SIDE) in [0, 1]."""
    x, y = _grid(rows)
    picture = _draw_ground(rows[:, :_GROUND], x, y)
    for cells in rows[:, _GROUND + MOST_THINGS * _THING :].split(_SPECK, dim=1):
        picture = _over(picture, cells[:, 4:7], _coverage(_capsule(cells, x, y)))
    for cells in _things(rows):
        distance = _distance(cells, x, y)
        picture = _over(picture, _fill(cells, x, y), _coverage(distance))
        outlined = cells[:, 8].view(-1, 1, 1, 1)
        picture = _over(picture, cells[:, 9:12], outlined * _coverage(distance.abs() - OUTLINE))
    return picture


def draw_outlines(rows: Tensor) -> Tensor:
    """How much of each pixel the outlines of all things cover: (B, 1, SIDE, SIDE) in [0, 1]."""
    x, y = _grid(rows)
    rings = [_coverage(_distance(cells, x, y).abs() - OUTLINE) for cells in _things(rows)]
    return torch.stack(rings).amax(0)


def apply_filters(pictures: Tensor, filters: Tensor) -> Tensor:
    """Each picture (B, 3, SIDE, SIDE) through the filter of its number (B) in `FILTERS`."""
    result = pictures.clone()
    for number, name in enumerate(FILTERS):
        chosen = filters == number
        if name != "none" and chosen.any():
            result[chosen] = _FILTERS[name](pictures[chosen])
    return result


def outline_everything(pictures: Tensor, rows: Tensor, filters: Tensor) -> Tensor:
    """The style of the miniature's style LoRA: every thing outlined in black.

    pictures: finished answers; rows: the scenes that they show, packed.
    """
    rings = draw_outlines(rows)
    for name in ("mirror", "flip"):
        chosen = filters == FILTERS.index(name)
        rings[chosen] = _FILTERS[name](rings[chosen])
    return pictures * (1 - rings)


def pictures_of(edits: Sequence[Edit]) -> tuple[Tensor, Tensor, Tensor]:
    """Edits as pictures before, right answers, and answers in the outlined style.

    Each (B, 3, SIDE, SIDE) in [0, 1], rounded to 8 bits.
    """
    before = torch.from_numpy(pack([edit.before for edit in edits]))
    after = torch.from_numpy(pack([edit.after for edit in edits]))
    filters = torch.tensor([FILTERS.index(edit.filter) for edit in edits])
    answers = apply_filters(draw(after), filters)
    styled = outline_everything(answers, after, filters)
    return round_8_bit(draw(before)), round_8_bit(answers), round_8_bit(styled)


def round_8_bit(pictures: Tensor) -> Tensor:
    """As a PNG file has them."""
    return (pictures * 255).round().clamp(0, 255) / 255


def to_image(picture: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] as an 8-bit RGB image."""
    values = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def to_picture(image: Image.Image) -> Tensor:
    """The inverse of `to_image`."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255


def _grid(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres, (1, SIDE) and (SIDE, 1)."""
    line = torch.arange(SIDE, device=rows.device, dtype=rows.dtype) + 0.5
    return line[None, :], line[:, None]


def _things(rows: Tensor) -> tuple[Tensor, ...]:
    things: tuple[Tensor, ...] = rows[:, _GROUND : _GROUND + MOST_THINGS * _THING].split(_THING, 1)
    return things


def _column(cells: Tensor, index: int) -> Tensor:
    return cells[:, index].view(-1, 1, 1)


def _coverage(distance: Tensor) -> Tensor:
    """How much of a pixel lies inside, from the signed distance of its centre: (B, 1, H, W)."""
    return (0.5 - distance).clamp(0, 1).unsqueeze(1)


def _over(picture: Tensor, paint: Tensor, coverage: Tensor) -> Tensor:
    paint = paint if paint.ndim == 4 else paint[:, :, None, None]
    return picture + coverage * (paint - picture)


def _draw_ground(cells: Tensor, x: Tensor, y: Tensor) -> Tensor:
    kind, period = _column(cells, 0), _column(cells, 8)
    across = _column(cells, 7)
    along = across * x + (1 - across) * y

    def wave(position: Tensor) -> Tensor:
        """A square wave of ±1 with soft edges."""
        return (period * torch.sin(position * (2 * math.pi / period))).clamp(-1, 1)

    dots = torch.cos(x * (2 * math.pi / period)) + torch.cos(y * (2 * math.pi / period))
    shares = {
        "flat": torch.zeros_like(x + y),
        "gradient": along / SIDE,
        "stripes": 0.5 + 0.5 * wave(along),
        "checks": 0.5 + 0.5 * wave(x) * wave(y),
        "dots": (0.5 + 0.5 * period * (dots - 1.2)).clamp(0, 1),
    }
    share = sum((kind == number) * shares[name] for number, name in enumerate(GROUNDS))
    first, second = cells[:, 1:4, None, None], cells[:, 4:7, None, None]
    return first + share.unsqueeze(1) * (second - first)  # type: ignore[union-attr]


def _fill(cells: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A thing's paint at every pixel: plain, darker towards its foot, or with darker stripes."""
    height = (y - _column(cells, 5)) / _column(cells, 6).clamp(min=1)
    stripes = (0.5 + 3 * torch.sin((x + y) * (2 * math.pi / 9))).clamp(0, 1)
    darker = (_column(cells, 7) == 1) * (0.35 * (height + 1) / 2).clamp(0, 0.35)
    darker = darker + (_column(cells, 7) == 2) * 0.35 * stripes
    return cells[:, 1:4, None, None] * (1 - darker.unsqueeze(1))


def _capsule(cells: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Distance to a line 3 pixels thick."""
    dx, dy = x - _column(cells, 0), y - _column(cells, 1)
    angle, half = _column(cells, 3), _column(cells, 2) / 2
    along = dx * angle.cos() + dy * angle.sin()
    aside = dy * angle.cos() - dx * angle.sin()
    return torch.hypot((along.abs() - half).clamp(min=0), aside) - 1.5


def _distance(cells: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a thing, in pixels, (B, H, W); far away where there is none."""
    radius = _column(cells, 6).clamp(min=1)
    u, v = (x - _column(cells, 4)) / radius, (y - _column(cells, 5)) / radius
    distance = torch.full_like(u + v, 1000.0)
    for number, name in enumerate(SHAPES):
        chosen = _column(cells, 0) == number
        distance = torch.where(chosen, _SHAPES[name](u, v) * radius, distance)
    return distance


# Distance functions: u to the right and v down, in units of the radius.


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 1


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs().expand_as(u + v)) - 0.88


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    side = math.sqrt(0.75) * u.abs() - 0.5 * v - 0.58
    return torch.maximum(side, (v - 0.72).expand_as(side))


def _star(u: Tensor, v: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    length = torch.hypot(u, v)
    along, aside = length * angle.cos(), length * angle.sin()
    tip, notch = 1.15, (0.5 * math.cos(sector / 2), 0.5 * math.sin(sector / 2))
    # The edge runs from the tip on the axis to the notch between two tips.
    normal = (notch[1], tip - notch[0])
    return ((along - tip) * normal[0] + aside * normal[1]) / math.hypot(*normal)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """Two discs on the upper sides of a square that stands on its corner."""
    a, b = 0.6 * u.abs(), 0.5 - 0.6 * v
    lobe = torch.hypot(a - 0.25, b - 0.75) - math.sqrt(0.125)
    half = (a + b).clamp(min=0) / 2
    edge = torch.minimum(torch.hypot(a, b - 1), torch.hypot(a - half, b - half))
    inner = edge * torch.sign(a - b)
    return torch.where(a + b > 1, lobe, inner) / 0.6


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.72).abs() - 0.26


def _cross(u: Tensor, v: Tensor) -> Tensor:
    def bar(long: Tensor, short: Tensor) -> Tensor:
        return torch.maximum(*torch.broadcast_tensors(long.abs() - 1, short.abs() - 0.36))

    return torch.minimum(bar(u, v), bar(v, u))


def _diamond(u: Tensor, v: Tensor) -> Tensor:
    return (1.25 * u.abs() + v.abs() - 1.12) / math.hypot(1.25, 1)


_SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
}


def _grayscale(pictures: Tensor) -> Tensor:
    """Luma as ITU-R BT.601 has it."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device, dtype=pictures.dtype)
    return (pictures * weights.view(3, 1, 1)).sum(1, keepdim=True).expand_as(pictures)


def _blur(pictures: Tensor) -> Tensor:
    """Gaussian, with a standard deviation of 3 pixels."""
    reach = torch.arange(-9, 10, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.exp(-(reach**2) / (2 * 3.0**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    wide = functional.pad(pictures, (9, 9, 9, 9), mode="replicate")
    rows = functional.conv2d(wide, kernel, groups=3)
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=3)


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "grayscale": _grayscale,
    "invert": lambda pictures: 1 - pictures,
    "brighten": lambda pictures: pictures + 0.45 * (1 - pictures),
    "darken": lambda pictures: 0.5 * pictures,
    "blur": _blur,
    "mirror": lambda pictures: pictures.flip(3),
    "flip": lambda pictures: pictures.flip(2),
}
