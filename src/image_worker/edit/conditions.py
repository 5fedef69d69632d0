"""What a picture is made from: the prompt as the text encoder reads it, references as latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from image_worker.edit import sizes
from image_worker.errors import InvalidRequest
from image_worker.model.build import Model
from image_worker.model.placement import TILE_SIDE
from image_worker.model.transformer import Shape
from image_worker.model.vae import statistics

MAX_PROMPT_TOKENS = 1024
_IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Conditions:
    """Encoded once per job, shared by all its pictures.

    text, negative: (tokens, width) in the model's type; negative is None without guidance.
    references: (tokens, channels), all references one after the other; shapes: one each.
    """

    text: Tensor
    negative: Tensor | None
    references: Tensor
    shapes: tuple[Shape, ...]


@torch.inference_mode()
def encode(
    model: Model, prompt: str, negative_prompt: str | None, images: Sequence[Image.Image]
) -> Conditions:
    """Encodes one job. `images` are RGB, `negative_prompt` None where there is no guidance.

    Both prompts have passed `check_prompt`.
    """
    seen, drawn = _resize(model, images)
    model.placement.bring("text_encoder")
    text = _encode_text(model, prompt, seen)
    negative = None if negative_prompt is None else _encode_text(model, negative_prompt, seen)
    model.placement.bring("vae")
    latents = [_encode_picture(model, pixels) for pixels in drawn]
    channels = model.transformer.config.in_channels
    nothing = torch.empty(0, channels, device=model.device, dtype=model.dtype)
    return Conditions(
        text,
        negative,
        torch.cat(latents) if latents else nothing,
        tuple(sizes.tokens(pixels.shape[-1], pixels.shape[-2]) for pixels in drawn),
    )


def check_prompt(model: Model, prompt: str, field: str) -> None:
    """Refuses a prompt that the model cannot read, without running the model.

    Raises:
        InvalidRequest: more than `MAX_PROMPT_TOKENS` tokens, or one of the model's control tokens,
            which would end the template or announce a picture that is not there.
    """
    ids = model.tokenizer(prompt).input_ids
    if len(ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"{len(ids)} tokens are too many; at most {MAX_PROMPT_TOKENS} are possible", field=field
        )
    control = set(ids) & set(model.tokenizer.all_special_ids)
    if control:
        token = model.tokenizer.convert_ids_to_tokens(min(control))
        raise InvalidRequest(f"the control token {token} is not allowed here", field=field)


def _resize(model: Model, images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[Tensor]]:
    """What the text encoder sees, and pixels for the VAE: (1, 3, 1, height, width) in [-1, 1]."""
    processor = VaeImageProcessor(vae_scale_factor=sizes.TOKEN)
    seen, drawn = [], []
    for image in images:
        ratio = image.width / image.height
        width, height = sizes.fit_area(model.entry.area, ratio)
        if model.entry.vision_area is None:  # the first Edit model shows both the same picture
            image = processor.resize(image, height, width)
            seen.append(image)
        else:
            seen_width, seen_height = sizes.fit_area(model.entry.vision_area, ratio)
            seen.append(processor.resize(image, seen_height, seen_width))
        drawn.append(processor.preprocess(image, height, width).unsqueeze(2))
    return seen, drawn


def _encode_text(model: Model, prompt: str, images: Sequence[Image.Image]) -> Tensor:
    """The text encoder's last hidden states without the template's head: (tokens, width)."""
    template = model.entry.template
    inputs = _tokenise(model, template.render(prompt, len(images)), images)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    hidden = model.text_encoder(**inputs).last_hidden_state
    return hidden[0, template.drop :].to(model.dtype)  # type: ignore[no-any-return]


def _tokenise(model: Model, text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Token ids and patches. One `<|image_pad|>` becomes as many as its picture has vision tokens.

    `mm_token_type_ids` (1 at those) is what gives a picture its two-dimensional positions: the
    stock pipelines leave it out, and the text encoder then places the patches on a line.
    """
    inputs: dict[str, Any] = {}
    if images:
        inputs.update(model.image_processor(images=list(images), return_tensors="pt"))
        merge = model.image_processor.merge_size**2
        *parts, rest = text.split(_IMAGE_PAD)
        counts = [int(grid.prod()) // merge for grid in inputs["image_grid_thw"]]
        expanded = [part + _IMAGE_PAD * count for part, count in zip(parts, counts, strict=True)]
        text = "".join(expanded) + rest
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    inputs["input_ids"] = ids
    inputs["attention_mask"] = torch.ones_like(ids)
    if images:
        pad = model.tokenizer.convert_tokens_to_ids(_IMAGE_PAD)
        inputs["mm_token_type_ids"] = (ids == pad).long()
    return inputs


def _encode_picture(model: Model, pixels: Tensor) -> Tensor:
    """One reference as normalised, packed latents: (tokens, channels)."""
    with tiles_where_needed(model, pixels.shape[-1] * pixels.shape[-2]):
        posterior = model.vae.encode(pixels.to(model.device, model.dtype)).latent_dist
    mean, deviation = statistics(model.vae, model.device, model.dtype)
    return pack((posterior.mode() - mean) / deviation)


@contextmanager
def tiles_where_needed(model: Model, pixels: int) -> Iterator[None]:
    """Has the VAE work in tiles for the time being, if a picture of `pixels` needs them to fit."""
    if model.plan.max_pixels is None or pixels <= model.plan.max_pixels:
        yield
        return
    stride = TILE_SIDE * 3 // 4
    model.vae.enable_tiling(TILE_SIDE, TILE_SIDE, stride, stride)
    try:
        yield
    finally:
        model.vae.disable_tiling()


def pack(latents: Tensor) -> Tensor:
    """(1, channels, 1, rows, columns) to (rows/2 · columns/2, 4 · channels): 2×2 patches."""
    _, channels, _, rows, columns = latents.shape
    patches = latents.view(channels, rows // 2, 2, columns // 2, 2)
    return patches.permute(1, 3, 0, 2, 4).reshape(rows // 2 * columns // 2, 4 * channels)


def unpack(tokens: Tensor, shape: Shape) -> Tensor:
    """The inverse of `pack`, for a picture of `shape` in tokens."""
    _, rows, columns = shape
    channels = tokens.shape[-1] // 4
    patches = tokens.view(rows, columns, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return patches.reshape(1, channels, 1, 2 * rows, 2 * columns)
