"""diffusers' own pipelines, to measure and to test against: with the one mend that they need.

The stock edit pipelines do not hand `mm_token_type_ids` to the text encoder (diffusers #14194);
`mend` adds them, and changes nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

from image_worker.catalog import LIGHTNING_SAMPLER


class PilProcessor(Qwen2VLProcessor):  # type: ignore[misc]
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
    folder: Path,
    dtype: torch.dtype,
    *,
    lora: Path | None = None,
    zero_cond_t: bool = False,
    nf4: bool = False,
) -> dict[str, Any]:
    """All parts of a stock pipeline from a folder in diffusers layout, by upstream's loaders.

    nf4: text encoder and transformer in 4 bits, as bitsandbytes has them, on the card.
    """
    kinds = (transformers.BitsAndBytesConfig, diffusers.BitsAndBytesConfig)
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    on_card = [{"quantization_config": kind(**bits), "device_map": "cuda"} for kind in kinds]
    for_text, for_pictures = on_card if nf4 else ({}, {})
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=dtype, **for_text
    ).eval()
    mend(text_encoder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, zero_cond_t=zero_cond_t, **for_pictures
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
    folder: Path,
    dtype: torch.dtype,
    *,
    lora: Path | None = None,
    zero_cond_t: bool = False,
    nf4: bool = False,
) -> QwenImageEditPlusPipeline:
    """The stock pipeline of the 2509 and 2511 models; a LoRA is fused by upstream's own loader."""
    parts = components(folder, dtype, lora=lora, zero_cond_t=zero_cond_t, nf4=nf4)
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
