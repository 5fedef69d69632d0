"""The miniature's edits: one right answer each, and a split that training cannot see across."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch

from tests import upstream
from tools.miniature import tokenizer
from tools.miniature.edits import (
    KINDS,
    TWO_PICTURES,
    Edit,
    held_out_edits,
    instruction,
    random_edit,
)
from tools.miniature.render import pictures_of
from tools.miniature.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    held_out_position,
    random_scene,
)
from tools.miniature.wordings import WORDINGS

BLANKS = {
    "thing": "the red circle",
    "other": "the blue star",
    "new": "green square",
    "colour": "pink",
    "second": "cyan",
    "shape": "ring",
    "place": "top",
}


def scenes(edit: Edit) -> list[Scene]:
    return [edit.before, edit.after, *([edit.reference] if edit.reference else [])]


def plain(text: str) -> str:
    """Without what is varied at random: opening, capital, full stop, spelling."""
    text = re.sub(r"^(please|now|could you) ", "", text.removesuffix(".").lower())
    for other, word in {"color": "colour", "grey": "gray", "image": "picture"}.items():
        text = text.replace(other, word)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_training_shows_nothing_that_is_held_out(kind: str) -> None:
    random = Random(kind)
    for edit in (random_edit(random, kind, "train") for _ in range(40)):
        assert all(scene.sound for scene in scenes(edit))
        shown = [thing for scene in scenes(edit) for thing in scene.things]
        assert not {thing.pair for thing in shown} & HELD_OUT_PAIRS
        drawn = [edit.before, edit.reference] if edit.reference else [edit.before]
        for scene in drawn:
            assert not any(held_out_position(thing.x, thing.y) for thing in scene.things)


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_asks_in_a_held_out_wording(kind: str) -> None:
    asked = {plain(instruction(Random(n), kind, "train", BLANKS)) for n in range(2000)}
    tested = {plain(instruction(Random(n), kind, "held out", BLANKS)) for n in range(200)}
    wording = WORDINGS[kind]
    assert len(tested) == len(wording.held_out)
    assert not asked & tested


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_edits_are_about_a_held_out_thing(kind: str) -> None:
    for number in range(5):
        edit = random_edit(Random(number), kind, "held out")
        shown = [thing for scene in scenes(edit) for thing in scene.things]
        assert {thing.pair for thing in shown} & HELD_OUT_PAIRS
        assert (edit.reference is not None) == (kind in TWO_PICTURES)


def test_every_colour_and_shape_has_one_held_out_pair() -> None:
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    assert len(HELD_OUT_PAIRS) == len(COLOURS) == len(SHAPES)


def test_held_out_edits_are_always_the_same() -> None:
    assert held_out_edits(2) == held_out_edits(2)
    assert [edit.kind for edit in held_out_edits(1)] == list(KINDS)


def test_every_edit_changes_the_picture() -> None:
    before, answers, _ = pictures_of(held_out_edits(5))
    changed = ((answers - before).abs().amax(1) > 0.04).float().mean((1, 2))
    assert changed.min() > 0.002


def test_held_out_wordings_use_words_that_training_knows() -> None:
    def words(sentences: tuple[str, ...]) -> set[str]:
        return {word for text in sentences for word in re.findall(r"\w+", text)}

    known = set().union(*(words(wording.train) for wording in WORDINGS.values()))
    for wording in WORDINGS.values():
        assert words(wording.held_out) <= known


def test_the_tokenizer_that_is_shipped_is_the_one_that_is_built() -> None:
    built, shipped = tokenizer.build(), upstream.tokenizer()
    assert built.get_vocab() == shipped.get_vocab()
    for wording in WORDINGS.values():
        for text in (*wording.train, *wording.held_out):
            text = text.format(**BLANKS)
            ids = shipped(text).input_ids
            assert ids == built(text).input_ids
            # A token a word; a digit has one for the space before it.
            assert len(ids) <= len(re.findall(r"\w+|[,.]", text)) + len(re.findall(r"\d", text))


def test_scenes_are_sound() -> None:
    for number in range(100):
        scene = random_scene(Random(number))
        assert scene.sound
        assert 2 <= len(scene.things) <= 4


def test_pictures_are_8_bit() -> None:
    for pictures in pictures_of(held_out_edits(1)):
        assert torch.equal(pictures, (pictures * 255).round() / 255)
        assert pictures.min() >= 0 and pictures.max() <= 1
