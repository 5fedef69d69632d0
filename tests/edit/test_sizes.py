"""Sizes that fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from image_worker.edit.sizes import TOKEN, shrunk, tokens

SIDES = st.integers(16, 128).map(lambda side: side * TOKEN)


@given(SIDES, SIDES, st.integers(-1000, 20_000))
def test_what_is_shrunk_fits_and_keeps_its_shape(width: int, height: int, most: int) -> None:
    _, rows, columns = tokens(width, height)
    found = shrunk((width, height), min(most, rows * columns), TOKEN)
    if found is None:
        assert most * min(rows, columns) <= max(rows, columns), "a side is under one token"
        return
    _, found_rows, found_columns = tokens(*found)
    assert found_rows * found_columns <= most
    assert found == (found_columns * TOKEN, found_rows * TOKEN)
    # Each side is less than a token from the exact shape.
    assert (found_rows + 1) * columns >= found_columns * rows
    assert (found_columns + 1) * rows >= found_rows * columns


def test_it_is_the_largest() -> None:
    assert shrunk((2048, 1024), 8192, 256) == (2048, 1024)
    assert shrunk((2048, 1024), 2048, 256) == (1024, 512)
    assert shrunk((2048, 1024), 2047, 256) == (1008, 496)


def test_a_side_must_not_be_too_small() -> None:
    assert shrunk((2048, 1024), 512, 256) == (512, 256)
    assert shrunk((2048, 1024), 511, 256) is None
    assert shrunk((1024, 1024), 0, 16) is None
    assert shrunk((1024, 1024), -5, 16) is None
