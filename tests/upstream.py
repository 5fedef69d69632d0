"""The oracle: diffusers' own modules, and its pipelines at the miniature's picture areas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as edit_plus
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2Tokenizer

from image_worker.bench.stock import (
    PilProcessor,
    components,
    edit_plus_pipeline,
    image_pipeline,
    lightning_scheduler,
    mend,
)
from image_worker.catalog import CATALOG, ModelEntry
from image_worker.model.configs import PATCH, TransformerConfig
from image_worker.model.skeleton import Skeleton
from image_worker.model.transformer import Row

__all__ = [
    "PilProcessor",
    "components",
    "edit",
    "edit_plus_pipeline",
    "image_pipeline",
    "lightning_scheduler",
    "mend",
    "options",
    "run",
    "text_encoder",
    "tokenizer",
    "transformer",
    "velocity",
]


def options(config: TransformerConfig) -> dict[str, Any]:
    """A configuration as diffusers' module takes it."""
    return dataclasses.asdict(config) | {"out_channels": config.in_channels // PATCH**2}


def transformer(source: Skeleton) -> Any:
    """diffusers' module with the weights of ours, or with those of its blocks that are left."""
    blocks = len(source.transformer_blocks)
    made = QwenImageTransformer2DModel(**options(source.config) | {"num_layers": blocks})
    made.load_state_dict(source.state_dict(), assign=True)
    return made.eval().requires_grad_(False)


@torch.inference_mode()
def velocity(transformer: Any, row: Row) -> torch.Tensor:
    """What diffusers' module makes of a row's picture: (tokens, channels)."""
    _, height, width = row.shapes[0]
    output = transformer(
        hidden_states=row.image[None],
        encoder_hidden_states=row.text[None],
        timestep=torch.tensor([row.timestep], dtype=row.image.dtype),
        img_shapes=[list(row.shapes)],
        return_dict=False,
    )[0]
    found: torch.Tensor = output[0, : height * width]
    return found


def tokenizer() -> Qwen2Tokenizer:
    """The miniature's, by transformers."""
    return Qwen2Tokenizer.from_pretrained(Path(CATALOG["mini"].repo) / "tokenizer")


def text_encoder(dtype: torch.dtype) -> Qwen2_5_VLModel:
    """The miniature's, by transformers."""
    folder = Path(CATALOG["mini"].repo) / "text_encoder"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().model


def edit(
    pipeline: Any, entry: ModelEntry, images: list[Image.Image], monkeypatch: Any, **options: Any
) -> tuple[torch.Tensor, Image.Image]:
    """Runs the stock pipeline at the entry's picture areas, which upstream holds as constants."""
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", entry.area)
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", entry.vision_area)
    return run(pipeline, image=images, **options)


def run(pipeline: Any, *, seed: int, **options: Any) -> tuple[torch.Tensor, Image.Image]:
    """What a stock pipeline makes: the latents after its last step, and their picture."""
    latents = []

    def keep(_: Any, step: int, time: Any, given: dict[str, torch.Tensor]) -> Any:
        latents.append(given["latents"][0])
        return given

    generator = torch.Generator("cpu").manual_seed(seed)
    found = pipeline(generator=generator, callback_on_step_end=keep, **options)
    return latents[-1], found.images[0]
