"""Blocks that pass through a card: the same numbers, whatever is copied when. `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from image_worker.errors import DoesNotFit
from image_worker.model.formats import format_of
from image_worker.model.packed import slots
from image_worker.model.pinned import Pinned
from image_worker.model.stream import Blocks, Held
from image_worker.settings import Precision, Settings
from image_worker.worker import Worker
from tests.pictures import psnr
from tests.worker_jobs import job, picture

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
WIDTH = 4096


def layers(precision: Precision, count: int = 7) -> Blocks:
    form, found = format_of(precision), []
    generator = torch.Generator(CARD).manual_seed(0)
    for _ in range(count):
        weight = torch.randn(WIDTH, WIDTH, device=CARD, generator=generator).bfloat16() / 64
        if form is None:
            layer: nn.Module = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            layer = form.encode(weight, False, torch.bfloat16)
        found.append(nn.Sequential(layer))
    return Blocks(found).requires_grad_(False)


def run(blocks: Blocks, tokens: int, until: int = 99) -> Tensor:
    x = torch.linspace(-1, 1, tokens * WIDTH, device=CARD).view(tokens, WIDTH).bfloat16()
    for number, block in enumerate(blocks.in_turn()):
        if number == until:
            break
        x = block(x)
    return x


def stream(blocks: Blocks, numbers: range) -> None:
    blocks.stream({n: Held.of(list(slots(blocks[n])), CARD) for n in numbers}, CARD)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "4bit"])
@pytest.mark.parametrize("tokens", [8, 8192])  # copies take longer than products, and the reverse
def test_every_pass_computes_the_same(precision: Precision, tokens: int) -> None:
    blocks = layers(precision)
    expected = run(blocks, tokens)
    stream(blocks, range(0, 7, 2))
    for _ in range(8):
        assert torch.equal(run(blocks, tokens), expected)
    stream(blocks, range(1, 7, 2))
    for until in (0, 3, 6, 99, 99):
        run(blocks, tokens, until)
        assert torch.equal(run(blocks, tokens), expected)


@torch.inference_mode()
def test_passes_on_two_streams_do_not_disturb_each_other() -> None:
    blocks, side = layers("bf16"), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    expected = run(blocks, 4096)
    stream(blocks, range(7))
    for number in range(12):
        if number % 2:
            assert torch.equal(run(blocks, 4096), expected)
            continue
        with torch.cuda.stream(side):
            found = run(blocks, 4096)
        side.synchronize()
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_what_leaves_gives_its_memory_back() -> None:
    blocks = layers("bf16", 16)
    expected, before = run(blocks, 64), torch.cuda.memory_allocated()
    while blocks.give_up(CARD):
        assert torch.equal(run(blocks, 64), expected)
    weights = 2 * WIDTH**2
    assert abs(before - torch.cuda.memory_allocated() - 14 * weights) < weights


def test_memory_is_locked_as_long_as_it_is_held() -> None:
    held = Pinned(3 * 2**20 + 512)
    held.lock(CARD)
    with pytest.raises(DoesNotFit, match="does not lock"):
        held.lock(CARD)  # it is already
    memory = held.memory
    del held
    again = Pinned(1)
    again.memory = memory
    again.lock(CARD)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "4bit", "8bit"])
def test_pictures_do_not_change(precision: str) -> None:
    def edit(offload: str) -> Image.Image:
        settings = Settings.from_env(
            {
                "MODEL": "mini",
                "PRECISION_MODE": precision,
                "CPU_OFFLOAD": offload,
                "REMEMBER_MB": "0",
            }
        )
        worker = Worker.from_settings(settings)
        assert bool(worker.model.plan.streamed) == (offload == "stream")
        replies = [worker.run_blocking(job(seed=3)) for _ in range(2)]
        assert replies[0]["images"] == replies[1]["images"]
        return picture(replies[0])

    assert psnr(edit("stream"), edit("none")) >= 60


def test_a_picture_is_the_same_after_weights_left_the_card() -> None:
    settings = Settings.from_env({"MODEL": "mini", "REMEMBER_MB": "0"})
    worker = Worker.from_settings(settings)
    small = picture(worker.run_blocking(job(seed=3)))
    assert not worker.model.transformer.blocks.away
    assert worker.model.make_room()
    assert worker.model.transformer.blocks.away
    assert psnr(picture(worker.run_blocking(job(seed=3))), small) >= 60
