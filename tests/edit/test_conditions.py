"""Prompts that the model cannot read are refused; pictures are packed and unpacked without loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from image_worker.edit import conditions
from image_worker.edit.conditions import Conditions
from image_worker.edit.sizes import output_size
from image_worker.errors import InvalidRequest
from image_worker.model.remembered import Remembered
from tests.conftest import make_picture, mini_model


def test_a_prompt_may_have_1024_tokens_and_no_more() -> None:
    model = mini_model()
    conditions.check_prompt(model, " red" * 1024, "prompt")
    with pytest.raises(InvalidRequest, match="1025 tokens") as caught:
        conditions.check_prompt(model, " red" * 1025, "prompt")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_control_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        conditions.check_prompt(mini_model(), f"blur {token} it", "negative_prompt")
    assert token in str(caught.value)
    assert caught.value.field == "negative_prompt"


def test_pictures_reach_the_text_encoder() -> None:
    model = mini_model()
    texts = [
        conditions.encode(model, "blur it", None, [make_picture(seed=seed)]).text for seed in (0, 1)
    ]
    assert texts[0].shape == texts[1].shape
    assert (texts[0] - texts[1]).abs().max() > 1e-3


def test_what_was_encoded_before_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(mini_model(), encodings=Remembered(10**8))
    brought: list[str] = []

    def note(name: str, method: Any) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            brought.append(name)
            return method(*arguments, **named)

        return noted

    for module, method in ((model.text_encoder, "forward"), (model.vae, "encode")):
        name = "vae" if module is model.vae else "text_encoder"
        monkeypatch.setattr(module, method, note(name, getattr(module, method)))

    def encode(prompt: str, *seeds: int) -> tuple[Conditions, list[str]]:
        brought.clear()
        images = [make_picture(seed=seed) for seed in seeds]
        return conditions.encode(model, prompt, " ", images), list(brought)

    first, steps = encode("blur it", 0, 1)
    assert steps == ["text_encoder"] * 2 + ["vae"] * 2
    again, steps = encode("blur it", 0, 1)
    assert not steps
    for one, other in zip(dataclasses.astuple(first), dataclasses.astuple(again), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert encode("sharpen it", 0, 1)[1] == ["text_encoder"]  # " " is known
    swapped, steps = encode("blur it", 1, 0)
    assert steps == ["text_encoder"] * 2
    assert torch.equal(swapped.references, first.references.roll(64, 0))
    assert encode("blur it", 0)[1] == ["text_encoder"] * 2
    assert encode("blur it", 2)[1] == ["text_encoder"] * 2 + ["vae"]


@pytest.mark.parametrize("size", [(300, 200), (40, 64)])
def test_pictures_are_reduced_as_upstream_does(size: tuple[int, int]) -> None:
    model, image = mini_model(), make_picture(*size)
    found = conditions.as_reference(model, image)
    height, width, _ = found.pixels.shape
    stock = VaeImageProcessor(vae_scale_factor=16)
    assert np.array_equal(found.pixels, stock.resize(image, height, width))
    assert found.seen.size != image.size
    assert np.array_equal(found.seen, stock.resize(image, found.seen.height, found.seen.width))


def test_unpack_undoes_pack() -> None:
    latents = torch.randn(1, 16, 6, 10)
    assert torch.equal(conditions.unpack(conditions.pack(latents), (1, 3, 5)), latents)


def test_no_reference_is_no_tokens() -> None:
    encoded = conditions.encode(mini_model(), "a red circle", None, [])
    assert encoded.references.shape == (0, 64)
    assert encoded.shapes == ()


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (None, None, (1184, 896)),
        (512, None, (512, 384)),
        (None, 512, (688, 512)),
        (640, 640, (640, 640)),
    ],
)
def test_a_side_not_asked_for_follows_the_picture(
    width: int | None, height: int | None, expected: tuple[int, int]
) -> None:
    assert output_size(1024 * 1024, 4 / 3, width, height) == expected
