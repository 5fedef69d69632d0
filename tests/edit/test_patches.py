"""What the text encoder and the VAE see of pictures equals upstream's, to the bit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from image_worker.edit import conditions, patches
from image_worker.errors import ModelMismatch
from image_worker.model.text_config import read_patching
from tests.conftest import MINI, MINI_FOLDER, mini_model

CONFIGS: dict[str, dict[str, Any]] = {
    "mini": json.loads((MINI_FOLDER / "processor" / "preprocessor_config.json").read_text()),
    "published": {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14},
    "both": {
        "min_pixels": 3136,
        "max_pixels": 50_000,
        "size": {"shortest_edge": 1, "longest_edge": 2},
    },
    "other": {
        "size": {"shortest_edge": 50_176, "longest_edge": 100_352},
        "patch_size": 6,
        "merge_size": 3,
        "temporal_patch_size": 1,
        "rescale_factor": 0.01,
        "image_mean": [0.1, 0.5, 0.9],
        "image_std": [0.2, 0.6, 1.1],
    },
    "defaults": {},
}
SIZES = [(128, 128), (140, 100), (33, 260), (900, 600), (20, 20), (384, 384), (416, 352), (10, 13)]


def noise(width: int, height: int) -> Image.Image:
    """Every value of every channel, somewhere."""
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_are_upstreams(name: str) -> None:
    config = CONFIGS[name]
    upstream = Qwen2VLImageProcessorPil(
        **{key: value for key, value in config.items() if key != "image_processor_type"}
    )
    patching = read_patching(config)
    for size in SIZES:
        image = noise(*size)
        expected = upstream(images=[image], return_tensors="pt")
        found, grid = patches.cut(image, patching)
        assert expected["image_grid_thw"].tolist() == [[1, *grid]], size
        assert torch.equal(found, expected["pixel_values"]), size
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"do_normalize": False}, "do_normalize: False"),
        ({"do_resize": False}, "do_resize: False"),
        ({"resample": 2}, "resample: 2"),
        ({"patch_size": "14"}, "patch_size is '14'"),
        ({"size": {"shortest_edge": 3136}}, "max_pixels is missing"),
        ({"image_mean": [0.5]}, "3 channels"),
        ({"image_std": [1, 2, "x"]}, "image_std is 'x'"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelMismatch) as caught:
        read_patching(change)
    assert "processor/preprocessor_config.json" in str(caught.value) and told in str(caught.value)


@pytest.mark.parametrize("vision_area", [None, 128 * 96])
def test_references_are_resized_as_upstream_does(vision_area: int | None) -> None:
    model = mini_model()
    model = dataclasses.replace(model, entry=dataclasses.replace(MINI, vision_area=vision_area))
    for size in SIZES[:4]:
        image = noise(*size)
        found = conditions.as_reference(model, image)
        height, width, _ = found.pixels.shape
        upstream = VaeImageProcessor(vae_scale_factor=16)
        fitted = np.asarray(upstream.resize(image, height, width))
        assert np.array_equal(found.pixels.numpy(), fitted)
        seen = upstream.resize(image, found.seen.height, found.seen.width)
        assert np.array_equal(np.asarray(found.seen), np.asarray(seen))
        assert (found.seen.size == (width, height)) == (vision_area is None)
