"""Sizes from the architecture alone are those of the true models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from image_worker.bench import checkpoint
from image_worker.catalog import CATALOG
from image_worker.model import components, weights
from image_worker.model.full_sizes import FOLDER, LORA_RANK, FullSize, full_size
from image_worker.model.hardware import GIB, Hardware
from image_worker.model.placement import plan
from image_worker.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text()
SETTINGS = Settings.from_env({})


@pytest.fixture(scope="module")
def full() -> FullSize:
    return full_size(CATALOG["edit-2509"], SETTINGS)


@pytest.fixture(scope="module")
def stock() -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the stock classes: diffusers' defaults, and the benchmarks' text encoder."""
    with init_empty_weights():
        models = {
            "transformer": QwenImageTransformer2DModel(),
            "vae": AutoencoderKLQwenImage(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(checkpoint.text_config()),
        }
    return {
        name: {path: tuple(one.shape) for path, one in model.named_parameters()}
        for name, model in models.items()
    }


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes.values():
        values = 1
        for side in shape:
            values *= side
        total += values
    return total


def test_shapes_are_those_of_the_stock_classes(
    stock: dict[str, dict[str, tuple[int, ...]]],
) -> None:
    for component in components.ALL:
        ours = weights.shapes_of(component.empty(FOLDER / component.name))
        theirs = {}
        for name, shape in stock[component.name].items():
            target = component.rename(name)
            if target is not None:
                is_cut = component.cut is not None and len(shape) == 5
                theirs[target] = shape[:2] + shape[3:] if is_cut else shape
        assert {name: tuple(shape) for name, shape in ours.items()} == theirs


def test_the_download_is_as_large_as_the_stock_classes_and_as_the_readme_says(
    full: FullSize, stock: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    assert full.checkpoint == 2 * sum(map(count, stock.values()))
    assert f"({full.checkpoint / 1e9:.0f} GB)" in README
    assert checkpoint.LORA_RANK == LORA_RANK
    assert 0.84e9 < full.lora < 0.86e9


def test_prepared_weights_are_as_large_as_the_readme_says(full: FullSize) -> None:
    assert f"({full.prepared('4bit') / 1e9:.0f} GB for 4bit)" in README
    assert f"{full.modulation / 1e9:.1f} of layers in bf16" in README
    assert full.prepared("4bit", whole=True) == full.prepared("4bit") + full.modulation


def test_the_plan_for_them_is_the_readmes(full: FullSize) -> None:
    """The table of what `auto` takes, by the free memory."""
    table = README.split("What `auto` takes", 1)[1].split("What passes waits", 1)[0]
    rows = re.findall(r"^\| ([\d.]+) (?:and more|to [^|]+) \| (\w+)[^|]*\| (.*) \|$", table, re.M)
    assert len(rows) == 5
    for least, precision, places in rows:
        card = Hardware("card", int(float(least) * GIB), capability=(8, 9))
        found = plan(SETTINGS, full.sizes, full.shape, card)
        assert found.precision == precision, least
        assert bool(found.streamed) == ("stay" not in places), least


def test_one_model_of_the_family_takes_more_while_denoising(full: FullSize) -> None:
    newer = full_size(CATALOG["edit-2511"], SETTINGS)
    assert not full.shape.zero_cond_t and newer.shape.zero_cond_t
    assert newer.sizes == full.sizes
