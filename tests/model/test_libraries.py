"""The card's libraries are made ready beside the reading of weights, or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from image_worker.model import libraries
from image_worker.model.placement import TILE_SIDE, Plan
from tests.conftest import build_mini

CPU = torch.device("cpu")


def test_they_are_used_as_edits_use_them() -> None:
    libraries.use_each(CPU, torch.float32)
    libraries.use_vae(build_mini().vae, 70, CPU, torch.float32)  # no multiple of eight


@pytest.mark.parametrize(
    ("area", "limit", "side"),
    [(128 * 128, None, 128), (1024 * 1024, 1024 * 1024, 1024), (1024 * 1024, 10**6, TILE_SIDE)],
)
def test_the_vae_works_at_the_size_that_jobs_have(
    area: int, limit: int | None, side: int, monkeypatch: Any
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(libraries, "keep_kernels", lambda _: None)
    monkeypatch.setattr(libraries, "use_each", lambda *_: None)
    monkeypatch.setattr(libraries, "use_vae", lambda _, side, *__: seen.append(side))
    libraries._load(recipe(area), Plan("4bit", max_pixels=limit), None)
    assert seen == [side]


def test_a_card_that_is_full_is_left_to_the_first_edit(monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(libraries, "keep_kernels", lambda _: None)
    monkeypatch.setattr(libraries, "use_each", full)
    libraries._load(recipe(1), Plan("4bit"), None)


def test_without_a_card_there_are_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(libraries, "_load", lambda *_: pytest.fail("they were used"))
    with libraries.loading(recipe(1), Plan("4bit"), None):
        pass


def recipe(area: int) -> Any:
    """What is asked of one."""
    entry = SimpleNamespace(area=area)
    return SimpleNamespace(device=CPU, dtype=torch.float32, entry=entry, settings=None)
