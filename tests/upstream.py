"""The oracle: diffusers' own pipelines, at the miniature's picture areas."""

from __future__ import annotations

from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as edit_plus
import torch
from PIL import Image

from image_worker.bench.stock import (
    PilProcessor,
    components,
    edit_plus_pipeline,
    image_pipeline,
    lightning_scheduler,
    mend,
)
from image_worker.catalog import ModelEntry

__all__ = [
    "PilProcessor",
    "components",
    "edit",
    "edit_plus_pipeline",
    "image_pipeline",
    "lightning_scheduler",
    "mend",
]


def edit(
    pipeline: Any,
    entry: ModelEntry,
    images: list[Image.Image],
    monkeypatch: Any,
    output_type: str,
    **options: Any,
) -> Any:
    """Runs the stock pipeline at the entry's picture areas, which upstream holds as constants."""
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", entry.area)
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", entry.vision_area)
    seed = options.pop("seed")
    generator = torch.Generator("cpu").manual_seed(seed)
    result = pipeline(image=images, generator=generator, output_type=output_type, **options)
    return result.images
