"""The miniature's world: pictures of a few plain shapes on a ground, described as plain values.

Nothing here draws (see `render.py`) or edits (see `edits.py`). Positions and sizes are in pixels,
x to the right and y down; colours are RGB in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

SIDE = 128

Rgb = tuple[float, float, float]
Split = Literal["train", "held out"]

COLOURS: dict[str, Rgb] = {
    "red": (0.86, 0.15, 0.15),
    "orange": (0.96, 0.55, 0.10),
    "yellow": (0.95, 0.85, 0.20),
    "green": (0.18, 0.62, 0.25),
    "cyan": (0.25, 0.78, 0.82),
    "blue": (0.16, 0.32, 0.84),
    "purple": (0.48, 0.20, 0.66),
    "pink": (0.95, 0.52, 0.70),
}
NEUTRALS: dict[str, Rgb] = {
    "white": (0.97, 0.97, 0.97),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
PLACES: dict[str, tuple[float, float]] = {
    "top left": (24, 24),
    "top": (64, 24),
    "top right": (104, 24),
    "left": (24, 64),
    "centre": (64, 64),
    "right": (104, 64),
    "bottom left": (24, 104),
    "bottom": (64, 104),
    "bottom right": (104, 104),
}
GROUNDS = ("flat", "gradient", "stripes", "checks", "dots")
FILLS = ("flat", "shaded", "striped")

# Each colour and each shape has one pair that no training picture shows.
HELD_OUT_PAIRS = frozenset(zip(COLOURS, SHAPES[3:] + SHAPES[:3], strict=True))


def held_out_position(x: float, y: float) -> bool:
    """One in eight of the 4-pixel squares of the picture holds no object's centre in training."""
    return (int(x) // 4 + 3 * (int(y) // 4)) % 8 == 0


@dataclass(frozen=True)
class Thing:
    """An object. `radius` is about half its height; `outline` the name of a colour, or None."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    fill: str = "flat"
    outline: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    def touches(self, other: Thing, gap: float = 5.0) -> bool:
        """Whether they come nearer to each other than `gap`."""
        reach = 1.15 * (self.radius + other.radius) + gap  # a star's tips reach over its radius
        return math.dist((self.x, self.y), (other.x, other.y)) < reach

    @property
    def inside(self) -> bool:
        """Whether it lies in the picture as a whole."""
        reach = 1.15 * self.radius + 2
        return reach <= min(self.x, self.y) and max(self.x, self.y) <= SIDE - reach


@dataclass(frozen=True)
class Ground:
    """What is behind everything. `first` and `second` alternate, or run into each other.

    name: the colour's name, None for a tint that has none; across: stripes and gradients run to
    the right instead of down; period: of the pattern, in pixels.
    """

    kind: str
    first: Rgb
    second: Rgb
    name: str | None = None
    across: bool = False
    period: float = 16.0


@dataclass(frozen=True)
class Speck:
    """Clutter: a short thick line that no instruction speaks of and every edit should keep."""

    x: float
    y: float
    length: float
    angle: float
    colour: Rgb


@dataclass(frozen=True)
class Scene:
    """One picture. Later things would cover earlier ones, but things do not overlap."""

    ground: Ground
    things: tuple[Thing, ...]
    specks: tuple[Speck, ...] = ()

    @property
    def sound(self) -> bool:
        """Things lie inside, apart from each other, and differ in name and from their ground."""
        things = self.things
        return (
            all(thing.inside for thing in things)
            and len({thing.pair for thing in things}) == len(things)
            and all(thing.colour != self.ground.name for thing in things)
            and not any(a.touches(b) for i, a in enumerate(things) for b in things[:i])
        )


def random_scene(random: Random, count: int | None = None) -> Scene:
    """A sound scene of `count` things, 2 to 4 if None, without regard to the split."""
    count = count or random.randint(2, 4)
    while True:
        cells = random.sample(list(PLACES.values()), count)
        things = tuple(_random_thing(random, x, y) for x, y in cells)
        scene = Scene(_random_ground(random), things)
        if scene.sound:
            return Scene(scene.ground, things, _random_specks(random, things))


def _random_thing(random: Random, x: float, y: float) -> Thing:
    return Thing(
        colour=random.choice(tuple(COLOURS)),
        shape=random.choice(SHAPES),
        x=x + random.uniform(-8, 8),
        y=y + random.uniform(-8, 8),
        radius=random.uniform(11, 15),
        fill=random.choices(FILLS, (4, 1, 1))[0],
    )


def _random_ground(random: Random) -> Ground:
    """Palette colours, neutrals and tints between them and white, plain or with a faint pattern."""
    name = random.choice((*COLOURS, *NEUTRALS, None, None, None, None, None, None, None, None))
    if name:
        first = colour(name)
    else:
        first = mix(colour(random.choice((*COLOURS, "gray"))), (1, 1, 1), random.uniform(0.4, 0.8))
    kind = random.choices(GROUNDS, (4, 2, 1, 1, 1))[0]
    second = mix(first, (1, 1, 1) if random.random() < 0.5 else (0, 0, 0), 0.12)
    if kind == "gradient":
        name = None
        second = mix(colour(random.choice((*COLOURS, *NEUTRALS))), (1, 1, 1), 0.5)
    return Ground(kind, first, second, name, random.random() < 0.5, random.uniform(12, 24))


def _random_specks(random: Random, things: tuple[Thing, ...]) -> tuple[Speck, ...]:
    """Up to eight, none of them under a thing: what is there cannot be known from the picture."""
    specks = []
    for _ in range(random.randint(0, 8)):
        x, y = random.uniform(4, SIDE - 4), random.uniform(4, SIDE - 4)
        if any(math.dist((x, y), (t.x, t.y)) < 1.2 * t.radius + 9 for t in things):
            continue
        tone = random.uniform(0.2, 0.9)
        specks.append(
            Speck(x, y, random.uniform(0, 8), random.uniform(0, math.pi), (tone, tone, tone))
        )
    return tuple(specks)


def colour(name: str) -> Rgb:
    """The RGB of a colour's name."""
    return COLOURS.get(name) or NEUTRALS[name]


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """`share` of the second colour, the rest of the first."""
    return tuple(a + share * (b - a) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]
