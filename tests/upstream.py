"""The oracle: diffusers' own pipelines, with the one mend that their text encoding needs.

The stock edit pipelines do not hand `mm_token_type_ids` to the text encoder (diffusers #14194);
`mend` adds them, and changes nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as edit_plus
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

from image_worker.catalog import LIGHTNING_SAMPLER, ModelEntry


class PilProcessor(Qwen2VLProcessor):
    """Upstream's processor without the check that asks for its video part (and torchvision)."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return ProcessorMixin.check_argument_for_proper_class(self, argument_name, argument)


def mend(text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Makes the text encoder see which tokens are pictures, as transformers 5 expects."""
    stock = text_encoder.forward

    def forward(input_ids: torch.Tensor, **inputs: Any) -> Any:
        if inputs.get("pixel_values") is not None:
            is_picture = input_ids == text_encoder.config.image_token_id
            inputs["mm_token_type_ids"] = is_picture.long()
        return stock(input_ids=input_ids, **inputs)

    text_encoder.forward = forward


def components(
    folder: Path, dtype: torch.dtype, *, lora: Path | None = None, zero_cond_t: bool = False
) -> dict[str, Any]:
    """All parts of a stock pipeline from a folder in diffusers layout, by upstream's loaders."""
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=dtype
    ).eval()
    mend(text_encoder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, zero_cond_t=zero_cond_t
    )
    if lora is not None:
        scheduler = lightning_scheduler()
    return {
        "scheduler": scheduler,
        "vae": AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype),
        "text_encoder": text_encoder,
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "transformer": transformer,
    }


def lightning_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of Lightning's authors."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=LIGHTNING_SAMPLER.base_shift,
        max_image_seq_len=8192,
        max_shift=LIGHTNING_SAMPLER.max_shift,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=None,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def edit_plus_pipeline(
    folder: Path, dtype: torch.dtype, *, lora: Path | None = None, zero_cond_t: bool = False
) -> QwenImageEditPlusPipeline:
    """The stock pipeline of the 2509 and 2511 models; a LoRA is fused by upstream's own loader."""
    parts = components(folder, dtype, lora=lora, zero_cond_t=zero_cond_t)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    processor = PilProcessor(image_processor=images, tokenizer=parts["tokenizer"])
    pipeline = QwenImageEditPlusPipeline(processor=processor, **parts)
    _fuse(pipeline, lora)
    return pipeline


def image_pipeline(
    folder: Path, dtype: torch.dtype, *, lora: Path | None = None
) -> QwenImagePipeline:
    """The stock pipeline of the text-to-image models."""
    pipeline = QwenImagePipeline(**components(folder, dtype, lora=lora))
    _fuse(pipeline, lora)
    return pipeline


def _fuse(pipeline: Any, lora: Path | None) -> None:
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def edit(
    pipeline: QwenImageEditPlusPipeline,
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
