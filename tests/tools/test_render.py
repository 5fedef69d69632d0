"""Drawing: where things are, what colour they have, and what filters do."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import ImageFilter

from tools.miniature.edits import FILTERS
from tools.miniature.render import (
    apply_filters,
    draw,
    draw_outlines,
    outline_everything,
    pack,
    to_image,
    to_picture,
)
from tools.miniature.scenes import COLOURS, SHAPES, SIDE, Ground, Scene, Speck, Thing

WHITE = (1.0, 1.0, 1.0)
PLAIN = Ground("flat", WHITE, WHITE)
# Area over the square of the radius, from each shape's geometry.
AREAS = {
    "circle": math.pi,
    "square": 4 * 0.88**2,
    "ring": math.pi * (0.98**2 - 0.46**2),
    "diamond": 2 * 1.12**2 / 1.25,
    "cross": 4 * (2 * 0.36) - (2 * 0.36) ** 2,
}


def drawn(*things: Thing, ground: Ground = PLAIN, specks: tuple[Speck, ...] = ()) -> torch.Tensor:
    return draw(torch.from_numpy(pack([Scene(ground, things, specks)])))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_where_it_should_in_its_colour(shape: str) -> None:
    picture = drawn(Thing("blue", shape, 40, 72, 16))
    covered = (picture - 1).abs().amax(0) > 0.01
    rows, columns = covered.nonzero().unbind(1)
    assert abs(columns.float().mean() + 0.5 - 40) < 1 and abs(rows.float().mean() + 0.5 - 72) < 4
    assert 10 < rows.max() - 72 + 1 < 20 and 10 < 72 - rows.min() < 20
    assert torch.allclose(picture[:, covered].min(1).values, torch.tensor(COLOURS["blue"]))


@pytest.mark.parametrize("shape", AREAS)
def test_a_shape_has_its_area(shape: str) -> None:
    picture = drawn(Thing("blue", shape, 64, 64, 30))
    inside = ((1 - picture[0]) / (1 - COLOURS["blue"][0])).sum().item()
    assert inside == pytest.approx(AREAS[shape] * 30**2, rel=0.02)


def test_shapes_differ() -> None:
    pictures = [drawn(Thing("blue", shape, 64, 64, 15)) for shape in SHAPES]
    for number, first in enumerate(pictures):
        for second in pictures[:number]:
            assert ((first - second).abs().amax(0) > 0.5).sum() > 40


def test_edges_are_soft_and_paint_covers() -> None:
    circle = drawn(Thing("blue", "circle", 64, 64, 20))[0]
    assert ((circle > 0.3) & (circle < 0.9)).any()
    both = drawn(Thing("blue", "square", 64, 64, 20), Thing("red", "circle", 64, 64, 8))
    assert torch.allclose(both[:, 64, 64], torch.tensor(COLOURS["red"]))


def test_grounds_and_specks() -> None:
    first, second = (0.2, 0.4, 0.6), (0.8, 0.6, 0.4)
    down = drawn(ground=Ground("gradient", first, second))
    assert (down[0].diff(dim=0) > 0).all() and (down[0].diff(dim=1) == 0).all()
    across = drawn(ground=Ground("gradient", first, second, across=True))
    assert torch.allclose(across[0], down[0].T)
    for kind in ("stripes", "checks", "dots"):
        values = drawn(ground=Ground(kind, first, second))[0]
        assert values.min() < 0.21 and values.max() > 0.79
    speck = drawn(specks=(Speck(64, 64, 8, 0, (0, 0, 0)),))[0] < 0.5
    assert speck[64, 60:68].all() and speck.sum() < 50


def test_outlines_surround_every_thing_and_only_things() -> None:
    rows = torch.from_numpy(pack([Scene(PLAIN, (Thing("blue", "circle", 64, 64, 20),))]))
    ring = draw_outlines(rows)[0, 0]
    assert ring[64, 84] == 1 and ring[64, 64] == 0 and ring[0, 0] == 0
    assert ring.sum().item() == pytest.approx(2 * math.pi * 20 * 4, rel=0.05)
    styled = outline_everything(draw(rows), rows, torch.tensor([0]))
    assert styled[0, :, 64, 84].max() == 0


def test_an_outline_is_drawn_in_its_colour() -> None:
    picture = drawn(Thing("blue", "circle", 64, 64, 20, outline="black"))
    assert picture[:, 64, 84].max() < 0.1


@pytest.mark.parametrize("name", FILTERS)
def test_filters(name: str) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, SIDE, SIDE)
    found = apply_filters(pictures, torch.tensor([FILTERS.index(name), 0]))
    assert torch.equal(found[1], pictures[1])
    before, after = pictures[0], found[0]
    if name == "blur":
        expected = to_picture(to_image(before).filter(ImageFilter.GaussianBlur(3)))
        assert (after - expected)[:, 12:-12, 12:-12].abs().max() < 0.02
        return
    expected = {
        "none": before,
        "grayscale": to_picture(to_image(before).convert("L")),
        "invert": 1 - before,
        "brighten": 1 - 0.55 * (1 - before),
        "darken": before / 2,
        "mirror": before.flip(2),
        "flip": before.flip(1),
    }[name]
    torch.testing.assert_close(after, expected, atol=0.005, rtol=0)
