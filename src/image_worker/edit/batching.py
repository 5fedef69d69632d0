"""Who shares a forward: pure functions of token counts.

Rows are packed, so they may have any lengths; but a forward's working memory grows with its tokens,
and from some number of tokens on so does its time, so there are limits to them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# Tokens that keep a card busy. An H200 took, in one measurement, 52 ms for 1,088 of them and 80 for
# four times as many, but 121 for 5,376 and 229 for twice as many: from here on, who joins gains
# little, and delays.
ENOUGH_TOKENS = 8192


@dataclass(frozen=True)
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

    pictures: being denoised at a time; tokens: in one forward (None: no limit), lowered by `learn`
    when the card shows that it holds less than was planned; enough: tokens of all that is being
    denoised, beyond which nobody joins (None: no limit).
    """

    pictures: int
    tokens: int | None = None
    enough: int | None = None

    def learn(self, tokens: int) -> None:
        """A forward of so many tokens ran out of memory."""
        self.tokens = min(tokens - 1, tokens - 1 if self.tokens is None else self.tokens)


def shares(
    lengths: Sequence[Length], tokens: int | None, styles: Sequence[Hashable] = ()
) -> list[list[int]]:
    """Numbers of rows, forward by forward, in their order, each row once.

    No forward has more than `tokens` tokens unless it is of one row alone. styles: what is the same
    for all rows of a forward, one for each row; none: it is the same for all.
    """
    found: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        alike = not styles or number == 0 or styles[number] == styles[number - 1]
        if found and alike and (tokens is None or length.total <= room):
            found[-1].append(number)
        else:
            found.append([number])
            room = tokens or 0
        room -= length.total
    return found


@dataclass(frozen=True)
class Load:
    """What a job asks of the transformer: its pictures, and the rows of all of them.

    style: the key of its LoRAs; None: it has none.
    """

    pictures: int
    rows: tuple[Length, ...]
    style: Hashable = None


def joins(running: Sequence[Load], newcomer: Load, limits: Limits) -> bool:
    """Whether a job can join others between two of their steps, and gain by it.

    The first job always runs. Those with other LoRAs would have forwards of their own.
    """
    if not running:
        return True
    if any(load.style != newcomer.style for load in running):
        return False
    loads = [*running, newcomer]
    if sum(load.pictures for load in loads) > limits.pictures:
        return False
    tokens = sum(row.total for load in loads for row in load.rows)
    return all(limit is None or tokens <= limit for limit in (limits.tokens, limits.enough))
