"""The judge: the right answer passes; no edit, half of one, another, and damage elsewhere fail."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from tools.miniature.edits import Edit, random_edit
from tools.miniature.quality import Examples, make_examples
from tools.miniature.render import draw, pack, pictures_of
from tools.miniature.scenes import COLOURS, SHAPES, Scene
from tools.miniature.score import in_style, judge, psnr


@pytest.fixture(scope="module")
def given() -> Examples:
    """Three of each kind."""
    return make_examples(3)


def drawn(scene: Scene) -> Tensor:
    return draw(torch.from_numpy(pack([scene])))


def of_kind(kind: str) -> tuple[Edit, Tensor, Tensor]:
    edit = random_edit(Random(kind), kind, "held out")
    before, answer, _ = pictures_of([edit])
    return edit, before, answer


def test_the_answer_passes(given: Examples) -> None:
    assert all(verdict.passed for verdict in judge(given.before, given.answers, given.answers))


def test_a_slightly_noisy_answer_passes(given: Examples) -> None:
    torch.manual_seed(0)
    noisy = (given.answers + 0.015 * torch.randn_like(given.answers)).clamp(0, 1)
    assert all(verdict.passed for verdict in judge(given.before, given.answers, noisy))


def test_the_unedited_picture_fails(given: Examples) -> None:
    for edit, verdict in zip(
        given.edits, judge(given.before, given.answers, given.before), strict=True
    ):
        assert not verdict.passed, edit.instruction
        assert verdict.change == pytest.approx(1)


def test_half_an_edit_fails(given: Examples) -> None:
    half = (given.before + given.answers) / 2
    assert not any(verdict.passed for verdict in judge(given.before, given.answers, half))


def test_another_edits_answer_fails(given: Examples) -> None:
    assert not any(
        verdict.passed for verdict in judge(given.before, given.answers, given.answers.roll(3, 0))
    )


@pytest.mark.parametrize(
    ("kind", "trait", "wrong"),
    [("recolour", "colour", name) for name in COLOURS]
    + [("reshape", "shape", name) for name in SHAPES],
)
def test_the_wrong_colour_or_shape_fails(kind: str, trait: str, wrong: str) -> None:
    edit, before, answer = of_kind(kind)
    new = next(thing for thing in edit.after.things if thing not in edit.before.things)
    changed = {new: replace(new, **{trait: wrong})}
    things = tuple(changed.get(thing, thing) for thing in edit.after.things)
    verdict = judge(before, answer, drawn(replace(edit.after, things=things)))[0]
    assert verdict.passed == (wrong == getattr(new, trait))


def test_the_right_thing_at_the_wrong_place_fails() -> None:
    edit, before, answer = of_kind("move")
    things = tuple(
        t if t in edit.before.things else replace(t, y=128 - t.y if t.y != 64 else 30)
        for t in edit.after.things
    )
    assert not judge(before, answer, drawn(replace(edit.after, things=things)))[0].passed


def test_damage_elsewhere_fails() -> None:
    _, before, answer = of_kind("recolour")
    damaged = answer.clone()
    same = (answer - before).abs().amax(1) == 0
    damaged[:, :, 100:, :][same[:, None, 100:, :].expand(-1, 3, -1, -1)] = 0.5
    verdict = judge(before, answer, damaged)[0]
    assert verdict.kept < 25 and not verdict.passed
    assert verdict.change == 0


def test_where_everything_changes_all_of_it_is_compared() -> None:
    white = torch.full((1, 3, 128, 128), 0.97)
    inverted, black = 1 - white, torch.zeros_like(white)
    inverted[:, :, 40:80, 40:80] = 0.8  # a thing that a black picture lacks
    verdict = judge(white, inverted, black)[0]
    assert verdict.change < 0.4 and not verdict.passed


def test_style_is_told_from_its_absence(given: Examples) -> None:
    assert all(in_style(given.answers, given.styled, given.styled))
    assert not any(in_style(given.answers, given.styled, given.answers))


def test_psnr() -> None:
    first = torch.zeros(2, 3, 4, 4)
    second = first + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(first, second), torch.tensor([20.0, 40.0]))
