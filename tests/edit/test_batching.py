"""Who shares a forward, and who joins whom."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from image_worker.edit.batching import Length, Limits, Load, joins, shares

LENGTHS = st.lists(
    st.builds(Length, st.integers(1, 20_000), st.integers(1, 1_500)), min_size=1, max_size=12
)


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 50_000)))
def test_every_row_runs_once_within_the_limits(lengths: list[Length], tokens: int | None) -> None:
    found = shares(lengths, tokens)
    assert sorted(row for share in found for row in share) == list(range(len(lengths)))
    for share in found:
        if len(share) > 1:
            assert tokens is None or sum(lengths[row].total for row in share) <= tokens


def test_forwards_are_as_few_as_their_limit_allows() -> None:
    small, large = Length(1000, 100), Length(8000, 100)
    assert shares([large, small, large, small], None) == [[0, 1, 2, 3]]
    assert shares([small] * 5, 2200) == [[0, 1], [2, 3], [4]]
    assert shares([small] * 5, 2199) == [[0], [1], [2], [3], [4]]
    assert shares([small, large, small, small], 2200) == [[0], [1], [2, 3]]


def load(image: int = 1000, text: int = 100, pictures: int = 1, rows: int = 1) -> Load:
    return Load(pictures, (Length(image, text),) * rows * pictures)


def test_rows_of_other_loras_have_forwards_of_their_own() -> None:
    small = [Length(1000, 100)] * 5
    assert shares(small, None, ["a"] * 5) == shares(small, None)
    assert shares(small, None, ["a", "a", None, "b", "b"]) == [[0, 1], [2], [3, 4]]
    assert shares(small, 2200, ["a", "a", "a", None, None]) == [[0, 1], [2], [3, 4]]


def test_nobody_joins_jobs_of_other_loras() -> None:
    limits = Limits(pictures=4)
    styled = dataclasses.replace(load(), style="a")
    assert joins([styled], styled, limits)
    assert not joins([styled], load(), limits) and not joins([load()], styled, limits)
    assert joins([], styled, limits)


def test_a_job_joins_those_whose_forward_it_can_share() -> None:
    limits = Limits(pictures=4, tokens=4400)
    assert joins([load(), load()], load(image=2000), limits)
    assert not joins([load(), load()], load(image=8000), limits), "too large"
    assert not joins([load(), load()], load(pictures=3), limits), "too many pictures"
    assert not joins([load(rows=2), load(rows=2)], load(), limits), "too many tokens"


def test_nobody_joins_a_card_that_is_busy_enough() -> None:
    assert joins([load()], load(), Limits(pictures=4, enough=2200))
    assert not joins([load()], load(), Limits(pictures=4, enough=2199))


def test_the_first_job_always_runs() -> None:
    assert joins([], load(image=10**6, pictures=9), Limits(pictures=1, tokens=1))


def test_limits_learn_downwards_only() -> None:
    limits = Limits(pictures=4)
    limits.learn(9000)
    limits.learn(12_000)
    assert limits.tokens == 8999
