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
    vae, seen = build_mini().vae, []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda _, given, made: seen.append((given[0].shape, made.shape)))
    libraries.use_vae(vae, 70, CPU, torch.float32)  # no multiple of eight
    sides = [[shape[-1] for shape in shapes] for shapes in seen]
    assert sides == [[64, 8], [8, 64]]


def test_each_kind_of_operation_is_used_once(monkeypatch: Any) -> None:
    seen = []
    ops = SimpleNamespace(quantise=lambda x, to: seen.append((x.shape[-1], to)))
    monkeypatch.setattr(libraries, "operations", lambda _: ops)
    for name in ("scaled_dot_product_attention", "linear"):
        monkeypatch.setattr(libraries.functional, name, lambda *_, name=name: seen.append(name))
    libraries.use_each(CPU, torch.float32)
    assert seen == ["scaled_dot_product_attention", "linear", (128, torch.int8)]


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
    used: list[Any] = []
    monkeypatch.setattr(libraries, "use_each", full)
    monkeypatch.setattr(libraries, "use_vae", lambda *given: used.append(given))
    libraries._load(recipe(1), Plan("4bit"), None)  # and does not raise
    assert not used


def test_without_a_card_there_are_none(monkeypatch: Any) -> None:
    used: list[Any] = []
    monkeypatch.setattr(libraries, "_load", lambda *given: used.append(given))
    with libraries.loading(recipe(1), Plan("4bit"), None):
        pass
    assert not used


def recipe(area: int) -> Any:
    """What is asked of one."""
    entry = SimpleNamespace(area=area)
    return SimpleNamespace(device=CPU, dtype=torch.float32, entry=entry, settings=None)
