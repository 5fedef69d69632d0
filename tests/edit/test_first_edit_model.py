"""The first Edit model's own way with pictures: one reference, shown whole to the text encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as stock_module
import torch
from diffusers import QwenImageEditPipeline
from transformers import Qwen2VLImageProcessorPil

from image_worker.catalog import EDIT
from image_worker.edit import conditions
from image_worker.edit.denoise import denoise, start
from tests import upstream
from tests.conftest import MINI, MINI_FOLDER, build_mini, make_picture


def test_equals_the_stock_pipeline(monkeypatch: Any) -> None:
    entry = dataclasses.replace(MINI, template=EDIT, max_images=1, vision_area=None)
    model = build_mini(torch.float64, entry, use_lightning_lora="0")
    image = make_picture(140, 100)
    encoded = conditions.encode(model, "blur the scene", None, [image])
    width, height = 160, 96
    picture = start(model, encoded, (width, height), seed=5, steps=6, cfg_scale=1.0)
    denoise(model, [picture])

    parts = upstream.components(MINI_FOLDER, torch.float64)
    images = Qwen2VLImageProcessorPil.from_pretrained(MINI_FOLDER / "processor")
    processor = upstream.PilProcessor(image_processor=images, tokenizer=parts["tokenizer"])
    pipeline = QwenImageEditPipeline(processor=processor, **parts)
    area = stock_module.calculate_dimensions
    monkeypatch.setattr(
        stock_module, "calculate_dimensions", lambda _, ratio: area(entry.area, ratio)
    )
    expected = pipeline(
        image=image,
        prompt="blur the scene",
        true_cfg_scale=1.0,
        width=width,
        height=height,
        num_inference_steps=6,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="latent",
    ).images
    assert (picture.latents - expected[0]).abs().max() <= 2e-6
