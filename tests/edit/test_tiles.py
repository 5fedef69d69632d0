"""Tiles of the VAE: used where a picture needs them, and only for that picture."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from image_worker.edit import conditions
from image_worker.edit.conditions import tile_side
from image_worker.edit.decode import decode
from image_worker.edit.denoise import start
from image_worker.model.build import Model
from image_worker.model.remembered import Remembered
from tests.conftest import make_picture, mini_model


def with_room_for(pixels: int | None) -> Model:
    model = mini_model()
    plan = dataclasses.replace(model.plan, max_pixels=pixels)
    return dataclasses.replace(model, plan=plan, encodings=Remembered(0))


@pytest.mark.parametrize(("limit", "side"), [(None, None), (640 * 640, None), (640 * 640 - 1, 512)])
def test_memory_decides(limit: int | None, side: int | None) -> None:
    assert tile_side(with_room_for(limit), 640 * 640) == side


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
