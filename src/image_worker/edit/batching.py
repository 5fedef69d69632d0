"""Who shares a forward: pure functions of token counts.

Rows of a forward are padded to the longest of them, so rows of like lengths belong together; and a
forward's working memory grows with its tokens, padding included, so there is a limit to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PADDING = 1 / 8  # of a forward's tokens: beyond, two forwards are faster than one


@dataclass(frozen=True, order=True)
class Length:
    """Tokens of one row: of its pictures, and of its prompt."""

    image: int
    text: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.image + self.text


@dataclass
class Limits:
    """What may run together.

    pictures: being denoised at a time; tokens: in one forward, padding included (None: no limit),
    lowered by `learn` when the card shows that it holds less than was planned.
    """

    pictures: int
    tokens: int | None = None

    def learn(self, tokens: int) -> None:
        """A forward of so many tokens ran out of memory."""
        self.tokens = min(tokens - 1, tokens - 1 if self.tokens is None else self.tokens)


def padded(lengths: Sequence[Length]) -> int:
    """Tokens of one forward of such rows, padding included."""
    longest = max(row.image for row in lengths) + max(row.text for row in lengths)
    return len(lengths) * longest


def shares(lengths: Sequence[Length], tokens: int | None) -> list[list[int]]:
    """Numbers of rows, forward by forward, each row once.

    No forward has more than `tokens` tokens unless it is of one row alone, and in none is more than
    `MAX_PADDING` padding.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        wider = [*found[-1], number] if found else []
        if wider and _suits([lengths[row] for row in wider], tokens):
            found[-1] = wider
        else:
            found.append([number])
    return found


def _suits(lengths: Sequence[Length], tokens: int | None) -> bool:
    together, needed = padded(lengths), sum(row.total for row in lengths)
    return (tokens is None or together <= tokens) and together - needed <= MAX_PADDING * together


@dataclass(frozen=True)
class Load:
    """What a job asks of the transformer: its pictures, and the rows of all of them."""

    pictures: int
    rows: tuple[Length, ...]


def joins(running: Sequence[Load], newcomer: Load, limits: Limits) -> bool:
    """Whether a job can join others between two of their steps, and gain by it.

    It does if one forward serves all of them: in forwards of their own they would only take turns,
    each slower than alone. The first job always runs.
    """
    if not running:
        return True
    if sum(load.pictures for load in running) + newcomer.pictures > limits.pictures:
        return False
    rows = [row for load in (*running, newcomer) for row in load.rows]
    return len(shares(rows, limits.tokens)) == 1
