"""The tables of what products are in, and that the README shows them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from image_worker.compute import AUTOMATIC, LEAST, POSSIBLE, Capability, automatic, possible
from image_worker.settings import Precision

CARDS: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("bf16", ["bf16"] * 7),
        ("fp8", ["bf16"] * 3 + ["fp8"] * 4),
        ("8bit", ["bf16"] * 7),
        ("svdq", ["bf16"] * 3 + ["fp8"] * 4),
        ("4bit", ["bf16"] * 3 + ["fp8"] * 4),
    ],
)
def test_what_auto_takes(precision: Precision, expected: list[str]) -> None:
    assert [automatic(precision, card, bf16=True) for card in CARDS] == expected
    assert automatic(precision, None, bf16=True) == "bf16"


def test_whatever_auto_takes_is_possible() -> None:
    assert set(AUTOMATIC) == set(POSSIBLE) == set(get_args(Precision))
    for precision, ways in AUTOMATIC.items():
        assert ways[-1] == ((0, 0), "bf16")
        for least, compute in ways:
            assert compute in POSSIBLE[precision] and least >= LEAST[compute]
        for card in CARDS:
            for bf16 in (False, True):
                found = possible(precision, card, bf16=bf16)
                assert "bf16" in found and automatic(precision, card, bf16=bf16) in found


def test_what_may_be_asked_for() -> None:
    assert possible("4bit", (7, 5), bf16=False) == ("bf16", "int8")
    assert possible("4bit", (8, 9), bf16=True) == ("bf16", "fp8", "int8")
    assert possible("4bit", (8, 9), bf16=False) == ("bf16", "int8")
    assert possible("8bit", (7, 0), bf16=False) == ("bf16",)
    assert possible("fp8", None, bf16=False) == ("bf16", "fp8")


def test_the_readme_shows_the_tables() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for precision, ways in AUTOMATIC.items():
        cells = [f"`{precision}`"]
        taken = [f"`{compute}` from {'.'.join(map(str, least))}" for least, compute in ways[:-1]]
        cells.append(", ".join([*taken, f"{'else ' if taken else ''}`{ways[-1][1]}`"]))
        for compute, least in LEAST.items():
            known = "any" if least == (0, 0) else ".".join(map(str, least))
            cells.append(known if compute in POSSIBLE[precision] else "")
        line = "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
        assert line in readme.splitlines(), line
