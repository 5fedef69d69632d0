"""Tiles of the VAE: used where a picture needs them, and only for that picture."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from image_worker.edit import conditions
from image_worker.edit.decode import decode
from image_worker.edit.denoise import start
from image_worker.edit.tiles import through_vae
from image_worker.errors import OutOfMemory
from image_worker.model.build import Model
from image_worker.model.remembered import Remembered
from tests.conftest import make_picture, mini_model


def with_room_for(pixels: int | None) -> Model:
    model = mini_model()
    plan = dataclasses.replace(model.plan, max_pixels=pixels)
    return dataclasses.replace(model, plan=plan, encodings=Remembered(0))


@pytest.mark.parametrize(("limit", "side"), [(None, None), (640 * 640, None), (640 * 640 - 1, 512)])
def test_the_plan_decides(limit: int | None, side: int | None) -> None:
    sides: list[int | None] = []
    through_vae(with_room_for(limit), 640 * 640, lambda tile: noted(tile, sides))
    assert sides == [side]


def noted(tile: int | None, sides: list[int | None], fails: int = 0) -> torch.Tensor:
    sides.append(tile)
    if len(sides) <= fails:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return torch.empty(0)


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_where_memory_runs_out_tiles_are_tried_and_then_room_is_made(
    fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int | None] = []
    rooms = [True, False]  # there is something to give up once
    monkeypatch.setattr(Model, "make_room", lambda _: rooms.pop(0))
    refused = pytest.raises(OutOfMemory) if fails == 3 else contextlib.nullcontext()
    with refused:
        through_vae(with_room_for(None), 640 * 640, lambda tile: noted(tile, sides, fails))
    assert sides == [None, 512, 512][: fails + 1]
    assert rooms == [True, False][fails - 1 :]


@torch.inference_mode()
def test_one_jobs_tiles_do_not_change_the_next_job() -> None:
    model = with_room_for(520 * 520)
    image = make_picture()
    before = conditions.encode(model, "blur it", None, [image])
    options = {"seed": 1, "steps": 2, "cfg_scale": 1.0}
    picture = start(model, before, (640, 640), **options)
    tiled = decode(model, picture)
    whole = decode(with_room_for(None), picture)
    assert tiled.size == whole.size and tiled.tobytes() != whole.tobytes()
    after = conditions.encode(model, "blur it", None, [image])
    assert torch.equal(before.references, after.references)
