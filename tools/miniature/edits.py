"""Edits with one right answer: a scene, an instruction, and the scene or picture that it asks for.

    EDITS   kind → how to draw one at random: scene before, scene after, the words' blanks

The split is decided here. Training never sees a held-out pair of colour and shape, an object
centred on a held-out position, or a held-out wording; a held-out edit is about an object that is
both such a pair and at such a position, and is asked for in such a wording.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import sub
from random import Random

from tools.miniature.scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    NEUTRALS,
    PLACES,
    SHAPES,
    Ground,
    Scene,
    Split,
    Thing,
    colour,
    held_out_position,
    random_scene,
)
from tools.miniature.wordings import OPENINGS, SPELLINGS, WORDINGS

# What is done to the whole picture after it is drawn (see `render.py`).
FILTERS = ("none", "grayscale", "invert", "brighten", "darken", "blur", "mirror", "flip")


@dataclass(frozen=True)
class Edit:
    """One edit. The answer is `after`, drawn, and then `filter` applied.

    blanks: the values of the wordings' blanks; reference: the second picture, for the kinds that
    have one.
    """

    kind: str
    instruction: str
    blanks: Mapping[str, str]
    before: Scene
    after: Scene
    filter: str = "none"
    reference: Scene | None = None


@dataclass(frozen=True)
class _Draft:
    """An edit without its wording. `subject`: whom it is about; `blanks`: the words' values."""

    before: Scene
    after: Scene
    subject: Thing
    blanks: dict[str, str] = field(default_factory=dict)
    filter: str = "none"
    reference: Scene | None = None

    @property
    def scenes(self) -> Iterator[Scene]:
        yield self.before
        yield self.after
        if self.reference:
            yield self.reference


def random_edit(random: Random, kind: str, split: Split) -> Edit:
    """One edit of a kind; drafts that do not suit it or the split are thrown away."""
    while True:
        draft = _DRAFTS[kind](random)
        if draft and all(scene.sound for scene in draft.scenes) and _belongs(draft, split):
            return Edit(
                kind,
                instruction(random, kind, split, draft.blanks),
                draft.blanks,
                draft.before,
                draft.after,
                draft.filter,
                draft.reference,
            )


def _belongs(draft: _Draft, split: Split) -> bool:
    drawn = [draft.before, draft.reference] if draft.reference else [draft.before]
    if split == "train":
        shown = [thing for scene in draft.scenes for thing in scene.things]
        placed = [thing for scene in drawn for thing in scene.things]
        return not any(thing.pair in HELD_OUT_PAIRS for thing in shown) and not any(
            held_out_position(thing.x, thing.y) for thing in placed
        )
    subject = draft.subject
    # A new thing's place is one of the nine that have names, so only its pair can be new.
    named = (subject.x, subject.y) in PLACES.values()
    return subject.pair in HELD_OUT_PAIRS and (named or held_out_position(subject.x, subject.y))


def instruction(random: Random, kind: str, split: Split, blanks: Mapping[str, str]) -> str:
    """A sentence that asks for an edit."""
    wording = WORDINGS[kind]
    known = wording.train if split == "train" else wording.held_out
    text = random.choice(known).format(**blanks)
    if random.random() < 0.3 and not text.startswith(("the ", "I ", "at ", "there ")):
        text = random.choice(OPENINGS) + text
    if random.random() < 0.3:
        # "picture 2" is a name that the prompt template gives; it has no other spelling.
        text = re.sub(r"\w+(?! \d)", lambda word: SPELLINGS.get(word[0], word[0]), text)
    if random.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def _name(random: Random, thing: Thing, scene: Scene) -> str:
    """ "the red circle", or less where that is enough to tell it from the others."""
    short = random.random()
    if short < 0.15 and sum(other.shape == thing.shape for other in scene.things) == 1:
        return f"the {thing.shape}"
    if short > 0.85 and sum(other.colour == thing.colour for other in scene.things) == 1:
        return f"the {thing.colour} {random.choice(('shape', 'object'))}"
    return f"the {thing.colour} {thing.shape}"


def _other(random: Random, choices: Iterable[str], *not_these: str | None) -> str:
    return random.choice([name for name in choices if name not in not_these])


def _with(scene: Scene, old: Thing, new: Thing | None) -> Scene:
    """The scene with one thing replaced, or gone."""
    things = (new if thing is old else thing for thing in scene.things)
    return replace(scene, things=tuple(thing for thing in things if thing))


def _changing(
    change: Callable[[Random, Thing, Scene], tuple[Thing | None, dict[str, str]]],
) -> Callable[[Random], _Draft]:
    """A draft in which one thing changes. `change` gives the new thing and the words' values."""

    def draft(random: Random) -> _Draft:
        scene = random_scene(random)
        thing = random.choice(scene.things)
        new, blanks = change(random, thing, scene)
        blanks["thing"] = _name(random, thing, scene)
        return _Draft(scene, _with(scene, thing, new), thing, blanks)

    return draft


def _recolour(random: Random, thing: Thing, scene: Scene) -> tuple[Thing, dict[str, str]]:
    name = _other(random, COLOURS, thing.colour, scene.ground.name)
    return replace(thing, colour=name), {"colour": name}


def _reshape(random: Random, thing: Thing, scene: Scene) -> tuple[Thing, dict[str, str]]:
    name = _other(random, SHAPES, thing.shape)
    return replace(thing, shape=name), {"shape": name}


def _resize(factor: float) -> Callable[[Random, Thing, Scene], tuple[Thing, dict[str, str]]]:
    return lambda random, thing, scene: (replace(thing, radius=factor * thing.radius), {})


def _move(random: Random, thing: Thing, scene: Scene) -> tuple[Thing, dict[str, str]]:
    place = random.choice(tuple(PLACES))
    x, y = PLACES[place]
    near = abs(x - thing.x) + abs(y - thing.y) < 20  # it is there already: not sound
    return replace(thing, x=-1 if near else x, y=y), {"place": place}


def _outline(random: Random, thing: Thing, scene: Scene) -> tuple[Thing, dict[str, str]]:
    name = _other(random, ("black", "white"), scene.ground.name)
    return replace(thing, outline=name), {"colour": name}


def _remove(random: Random, thing: Thing, scene: Scene) -> tuple[None, dict[str, str]]:
    return None, {}


def _add(random: Random) -> _Draft:
    scene = random_scene(random)
    place = random.choice(tuple(PLACES))
    x, y = PLACES[place]
    thing = Thing(random.choice(tuple(COLOURS)), random.choice(SHAPES), x, y, radius=13)
    after = replace(scene, things=(*scene.things, thing))
    return _Draft(scene, after, thing, {"new": " ".join(thing.pair), "place": place})


def _ground(random: Random) -> _Draft | None:
    scene = random_scene(random)
    name = _other(random, (*COLOURS, *NEUTRALS), scene.ground.name)
    if max(map(abs, map(sub, scene.ground.first, colour(name)))) < 0.1:
        return None  # a gradient that starts with this colour, and may be it all over
    ground = Ground("flat", colour(name), colour(name), name)
    return _about_all(random, scene, replace(scene, ground=ground), {"colour": name})


def _gradient(random: Random) -> _Draft:
    """From top to bottom. Neither colour is a thing's, or the thing would fade into it."""
    scene = random_scene(random)
    used = {thing.colour for thing in scene.things}
    first = _other(random, (*COLOURS, *NEUTRALS), *used)
    second = _other(random, (*COLOURS, *NEUTRALS), first, *used)
    ground = Ground("gradient", colour(first), colour(second))
    blanks = {"colour": first, "second": second}
    return _about_all(random, scene, replace(scene, ground=ground), blanks)


def _swap(random: Random) -> _Draft | None:
    scene = random_scene(random)
    one, two = random.sample(scene.things, 2)
    if one.colour == two.colour:
        return None
    after = _with(scene, one, replace(one, colour=two.colour))
    after = _with(after, two, replace(two, colour=one.colour))
    blanks = {"thing": _name(random, one, scene), "other": _name(random, two, scene)}
    return _Draft(scene, after, random.choice((one, two)), blanks)


def _filtered(name: str) -> Callable[[Random], _Draft]:
    def draft(random: Random) -> _Draft:
        scene = random_scene(random)
        return replace(_about_all(random, scene, scene, {}), filter=name)

    return draft


def _insert(random: Random) -> _Draft:
    """The reference's only thing comes, as it is, to a named place of the scene."""
    scene, reference = random_scene(random, random.randint(1, 3)), random_scene(random, 1)
    place = random.choice(tuple(PLACES))
    x, y = PLACES[place]
    thing = replace(reference.things[0], x=x, y=y)
    after = replace(scene, things=(*scene.things, thing))
    return _Draft(scene, after, reference.things[0], {"place": place}, reference=reference)


def _palette(random: Random) -> _Draft | None:
    """The ground takes the reference's ground, every thing the colour of the reference's thing."""
    scene, reference = random_scene(random), random_scene(random, 1)
    if reference.ground.kind != "flat" or len({t.shape for t in scene.things}) < len(scene.things):
        return None
    name = reference.things[0].colour
    after = replace(
        scene,
        ground=reference.ground,
        things=tuple(replace(thing, colour=name) for thing in scene.things),
    )
    return replace(_about_all(random, scene, after, {}), reference=reference)


def _about_all(random: Random, before: Scene, after: Scene, blanks: dict[str, str]) -> _Draft:
    """No thing in particular is meant; any may be the held-out one."""
    return _Draft(before, after, random.choice(before.things), blanks)


_DRAFTS: dict[str, Callable[[Random], _Draft | None]] = {
    "recolour": _changing(_recolour),
    "remove": _changing(_remove),
    "add": _add,
    "reshape": _changing(_reshape),
    "enlarge": _changing(_resize(1.5)),
    "shrink": _changing(_resize(0.6)),
    "move": _changing(_move),
    "ground": _ground,
    "gradient": _gradient,
    "swap": _swap,
    **{name: _filtered(name) for name in FILTERS if name != "none"},
    "outline": _changing(_outline),
    "insert": _insert,
    "palette": _palette,
}
ONE_PICTURE = tuple(kind for kind in _DRAFTS if kind not in ("insert", "palette"))
TWO_PICTURES = ("insert", "palette")
KINDS = ONE_PICTURE + TWO_PICTURES


# How often training draws a kind: what is learned in minutes needs to be seen less.
_OFTEN = {
    "reshape": 2.5,
    "enlarge": 2.0,
    "shrink": 1.5,
    "move": 1.5,
    "swap": 2.0,
    "outline": 2.0,
    "insert": 2.0,
    "ground": 0.8,
    "gradient": 0.6,
    **dict.fromkeys(FILTERS[1:], 0.4),
}


def training_edit(random: Random, kinds: Sequence[str]) -> Edit:
    """An edit of one of `kinds` to train with."""
    weights = [_OFTEN.get(kind, 1.0) for kind in kinds]
    return random_edit(random, random.choices(kinds, weights)[0], "train")


def held_out_edits(per_kind: int) -> list[Edit]:
    """The edits that every figure about quality is measured on; always the same."""
    return [
        random_edit(Random(f"{kind} {number}"), kind, "held out")
        for kind in KINDS
        for number in range(per_kind)
    ]
