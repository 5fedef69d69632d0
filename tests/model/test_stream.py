"""Blocks that pass through the card, on the CPU, where order and numbers are the same."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_worker.edit.conditions import encode
from image_worker.edit.decode import decode_pixels
from image_worker.edit.denoise import denoise, start
from image_worker.errors import CardLost, DoesNotFit
from image_worker.model import build as build_module
from image_worker.model.build import Model, build
from image_worker.model.formats import format_of
from image_worker.model.hardware import Hardware
from image_worker.model.packed import Layout, slots
from image_worker.model.pinned import OnDisk, Pinned
from image_worker.model.placement import Plan
from image_worker.model.stream import Blocks, Held, blocks_of
from image_worker.model.tensor_file import bytes_of
from image_worker.settings import Precision, Settings
from tests.conftest import MINI, build_mini, make_picture

CPU = torch.device("cpu")


def layers(precision: Precision, count: int = 5) -> Blocks:
    torch.manual_seed(0)
    form, found = format_of(precision), []
    for _ in range(count):
        weight = torch.randn(256, 256) / 16
        if form is None:
            layer: nn.Module = nn.Linear(256, 256, bias=False)
        else:
            layer = form.encode(weight, False, torch.float32)
        found.append(nn.Sequential(layer, nn.BatchNorm1d(256)).eval().requires_grad_(False))
    return Blocks(found)


def stream(blocks: Blocks, numbers: Iterable[int]) -> None:
    blocks.stream({n: Held.of(list(slots(blocks[n])), CPU) for n in numbers}, CPU)


def run(blocks: Blocks, until: int = 99) -> Tensor:
    x = torch.linspace(-1, 1, 2048).view(8, 256)
    for number, block in enumerate(blocks.in_turn()):
        if number == until:
            break
        x = block(x)
    return x


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "svdq", "4bit"])
@pytest.mark.parametrize("numbers", [(0,), (2, 4), (0, 1, 3), (0, 1, 2, 3, 4)])
def test_they_compute_what_they_did_in_every_pass(
    precision: Precision, numbers: tuple[int, ...]
) -> None:
    expected = run(layers(precision))
    blocks = layers(precision)
    stream(blocks, numbers)
    assert blocks.away == list(numbers)
    for _ in range(3):
        assert torch.equal(run(blocks), expected)


@torch.inference_mode()
def test_what_passes_takes_the_memory_of_two_blocks() -> None:
    blocks = layers("bf16")
    stream(blocks, range(5))
    storages = {slot.tensor.untyped_storage().data_ptr() for slot in slots(blocks)}
    assert len(storages) == 2
    largest = max(Layout.of(slots(block)).size for block in blocks)
    assert all(slot.tensor.untyped_storage().nbytes() == largest for slot in slots(blocks))


@torch.inference_mode()
@pytest.mark.parametrize("until", [0, 1, 2, 4])
def test_a_pass_that_is_given_up_does_not_disturb_the_next(until: int) -> None:
    expected, blocks = run(layers("bf16")), layers("bf16")
    stream(blocks, range(5))
    run(blocks, until)
    assert torch.equal(run(blocks), expected)


@torch.inference_mode()
def test_a_pass_that_fails_does_not_disturb_the_next() -> None:
    expected, blocks = run(layers("bf16")), layers("bf16")
    stream(blocks, range(5))
    handle = blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(blocks)
    handle.remove()
    assert torch.equal(run(blocks), expected)


@torch.inference_mode()
def test_half_of_those_that_stay_leave_until_none_is_left() -> None:
    expected, blocks = run(layers("4bit", 9)), layers("4bit", 9)
    counts = [0]
    while blocks.give_up(CPU):
        counts.append(len(blocks.away))
        assert torch.equal(run(blocks), expected)
    assert counts == [0, 5, 7, 8, 9]


@torch.inference_mode()
def test_at_home_they_hold_their_own_weights() -> None:
    blocks, stay = layers("bf16"), layers("bf16")
    stream(blocks, (0, 1, 2, 4))
    run(blocks)
    with blocks.at_home():
        for here, there in zip(slots(blocks), slots(stay), strict=True):
            assert torch.equal(here.tensor, there.tensor)
    assert torch.equal(run(blocks), run(stay))


def passing(model: Model, *, every: bool = False) -> frozenset[str]:
    """Every block but one of the transformer's, and every second of the text encoder's; or all."""
    lists = {
        f"{name}/{path}": part
        for name in ("transformer", "text_encoder")
        for path, part in getattr(model, name).named_modules()
        if isinstance(part, Blocks)
    }
    return frozenset(
        f"{name}.{number:02d}"
        for name, blocks in lists.items()
        for number in range(len(blocks))
        if every or (number != 1 if name.startswith("transformer") else number % 2 == 0)
    )


@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "4bit"])
def test_pictures_are_the_same(precision: Precision, tmp_path: Path, monkeypatch: Any) -> None:
    """From the checkpoint, from what that start prepared, and from what a start without did."""
    stays = build_mini(precision_mode=precision)
    streamed = passing(stays)
    expected = edit(stays)
    monkeypatch.setattr(build_module, "plan", lambda *_: Plan(precision, streamed))
    for folder, count in (("one", 2), ("other", 1)):
        variables = {"model_dir": str(tmp_path / folder), "keep_prepared": "1"}
        if folder == "other":
            with monkeypatch.context() as patch:
                patch.setattr(build_module, "plan", lambda *_: Plan(precision))
                build_mini(precision_mode=precision, **variables)
        for _ in range(count):
            model = build_mini(precision_mode=precision, **variables)
            lists = blocks_of(model.transformer, model.text_encoder)
            assert sum(len(blocks.away) for blocks in lists) == len(streamed)
            assert torch.equal(edit(model), expected)
    steps = [step.name for step in model.cold_start.steps]
    assert "prepare" not in steps


@pytest.mark.parametrize("precision", ["bf16", "4bit"])
def test_pictures_are_the_same_when_no_block_stays(
    precision: Precision, tmp_path: Path, monkeypatch: Any
) -> None:
    stays = build_mini(precision_mode=precision)
    found = Plan(precision, passing(stays, every=True))
    monkeypatch.setattr(build_module, "plan", lambda *_: found)
    for _ in range(2):
        model = build_mini(precision_mode=precision, model_dir=str(tmp_path), keep_prepared="1")
        assert torch.equal(edit(model), edit(stays))
    assert "prepare" not in [step.name for step in model.cold_start.steps]


def test_from_disk_pictures_are_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    variables = {"precision_mode": "4bit", "model_dir": str(tmp_path), "keep_prepared": "1"}
    stays = build_mini(**variables)
    found = Plan("4bit", passing(stays), from_disk=True)
    monkeypatch.setattr(build_module, "plan", lambda *_: found)
    model = build_mini(**variables)
    assert torch.equal(edit(model), edit(stays))
    shutil.rmtree(tmp_path / "prepared")  # it has the files open
    assert torch.equal(edit(model), edit(stays))
    with pytest.raises(DoesNotFit, match="image_worker prepare"):
        build_mini(**variables)


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("weights")}


def test_threads_that_read_end_with_a_start_that_is_given_up(
    tmp_path: Path, monkeypatch: Any
) -> None:
    variables = {"precision_mode": "bf16", "model_dir": str(tmp_path), "keep_prepared": "1"}
    found = Plan("bf16", passing(build_mini(**variables)), from_disk=True)
    monkeypatch.setattr(build_module, "plan", lambda *_: found)
    before, begun = readers(), []

    def first_edit(model: Model) -> None:
        encode(model, "blur it", None, [])
        begun.append(readers() - before)
        if len(begun) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    settings = Settings.from_env({name.upper(): value for name, value in variables.items()})
    gc.disable()  # as while a worker starts
    try:
        model = build(settings, MINI, Hardware("CPU"), dtype=torch.float32, first_edit=first_edit)
    finally:
        gc.enable()
    given_up = begun[0]
    for thread in given_up:
        thread.join(10)
    assert given_up and len(readers() - before) == len(given_up)
    assert model.plan.from_disk


@torch.inference_mode()
def test_a_file_that_is_cut_off_while_it_serves_is_an_error_and_no_wrong_number(
    tmp_path: Path,
) -> None:
    expected, blocks = run(layers("bf16")), layers("bf16")
    held, paths = {}, []
    for number in range(5):
        one = Held.of(list(slots(blocks[number])), CPU)
        assert isinstance(one.host, Pinned)
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(bytes_of(one.host.memory))
        size = len(one.host.memory)
        held[number] = Held(one.slots, one.layout, OnDisk(paths[-1], 0, size))
    blocks.stream(held, CPU)
    for until in (99, 2, 99, 1, 99):
        assert until != 99 or torch.equal(run(blocks), expected)
        run(blocks, until)
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[:-1])
    for _ in range(2):
        with pytest.raises(CardLost, match="cannot be read any more"):
            run(blocks)
    paths[3].write_bytes(whole)
    assert torch.equal(run(blocks), expected)


def edit(model: Model) -> Tensor:
    conditions = encode(model, "make the red circle blue", None, [make_picture()])
    picture = start(model, conditions, (128, 128), seed=0, steps=2, cfg_scale=1.0)
    denoise(model, [picture])
    return decode_pixels(model, picture)
