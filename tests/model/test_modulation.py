"""Tables by timestep: made once, and there as long as somebody holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from image_worker.model import modulation
from image_worker.model.components import TRANSFORMER
from image_worker.model.modulation import Modulation
from tests.conftest import read_mini


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tables, and each pass over the layers that was needed for them."""
    found = Modulation(read_mini(TRANSFORMER, torch.float32), torch.device("cpu"), torch.float32)
    passes: list[list[float]] = []
    stock = found._make

    def make(levels: Any, changed: Any) -> Any:
        if levels:
            passes.append(list(levels))
        return stock(levels, changed)

    monkeypatch.setattr(found, "_make", make)
    monkeypatch.setattr(modulation, "KEPT", 3)
    return found, passes


def test_a_schedule_is_one_pass(made: Any) -> None:
    tables, passes = made
    tables.prepare([0.5, 0.25, 0.5])
    tables.of_output([0.25, 0.5])
    tables.prepare([0.25, 0.125])
    assert passes == [[0.5, 0.25], [0.125]]


def test_held_tables_stay_and_others_go(made: Any) -> None:
    tables, passes = made
    held = tables.prepare([0.9, 0.8, 0.7, 0.6, 0.5])
    others = [0.4, 0.3, 0.2, 0.1]
    tables.prepare(others)
    passes.clear()
    for level, table in zip([0.9, 0.8, 0.7, 0.6, 0.5], held, strict=True):
        assert tables.prepare([level])[0] is table
    assert not passes
    del held, table
    tables.prepare(others)
    assert passes == [others]
    passes.clear()
    tables.prepare([0.9])
    assert passes == [[0.9]]
