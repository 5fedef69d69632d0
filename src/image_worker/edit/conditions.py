"""What a picture is made from: the prompt as the text encoder reads it, references as latents."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_worker.edit import patches, sizes
from image_worker.edit.batching import Length
from image_worker.edit.latents import statistics
from image_worker.edit.tiles import through_vae
from image_worker.errors import InvalidRequest
from image_worker.model.build import Model
from image_worker.model.embeddings import Shape
from image_worker.model.memory import with_room
from image_worker.model.vision_tower import Grid

MAX_PROMPT_TOKENS = 1024
_IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Reference:
    """A picture, reduced to what the model reads of it.

    ratio: width / height as it came; seen: for the text encoder;
    pixels: for the VAE, (height, width, 3) uint8;
    key: a hash of both, the same for equal pictures only.
    """

    ratio: float
    seen: Image.Image
    pixels: Tensor
    key: bytes

    @property
    def shape(self) -> Shape:
        """Its size in tokens."""
        height, width, _ = self.pixels.shape
        return sizes.tokens(width, height)


@dataclass(frozen=True)
class Prompt:
    """The text encoder's inputs, on the CPU, and a key that is the same for equal inputs only.

    ids (tokens); patches (patches, values): of its pictures, None without; grids: one each.
    """

    ids: Tensor
    patches: Tensor | None
    grids: tuple[Grid, ...]
    key: bytes


@dataclass(frozen=True)
class Prepared:
    """A job's prompts and pictures as tensors on the CPU: all that can be done beside the card.

    negative is None without guidance.
    """

    prompt: Prompt
    negative: Prompt | None
    references: tuple[Reference, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The pictures' sizes in tokens."""
        return tuple(reference.shape for reference in self.references)


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


def encode(
    model: Model, prompt: str, negative_prompt: str | None, images: Sequence[Image.Image]
) -> Conditions:
    """Encodes one job. `images` are RGB, `negative_prompt` None where there is no guidance.

    Both prompts have passed `check_prompt`.
    """
    references = [as_reference(model, image) for image in images]
    prepared = prepare(model, prompt, negative_prompt, references)
    text, negative = encode_prompts(model, prepared)
    return Conditions(text, negative, encode_references(model, prepared), prepared.shapes)


def prepare(
    model: Model, prompt: str, negative_prompt: str | None, references: Sequence[Reference]
) -> Prepared:
    """The part of `encode` that needs no card; may be called from any thread."""
    cut = [patches.cut(reference.seen, model.patching) for reference in references]
    seen = torch.cat([part for part, _ in cut]) if cut else None
    grids = tuple(grid for _, grid in cut)
    pictures = b"%d" % len(cut) + b"".join(reference.key for reference in references)

    def read(text: str) -> Prompt:
        ids = _tokenise(model, model.entry.template.render(text, len(cut)), grids)
        return Prompt(ids, seen, grids, pictures + ids.numpy().tobytes())

    negative = None if negative_prompt is None else read(negative_prompt)
    return Prepared(read(prompt), negative, tuple(references))


def row_lengths(
    model: Model, prepared: Prepared, size: tuple[int, int], pictures: int
) -> list[Length]:
    """The transformer's rows of a job: so many results of `size` (width, height) in pixels."""
    shapes = (sizes.tokens(*size), *prepared.shapes)
    image = sum(rows * columns for _, rows, columns in shapes)
    prompts = [prompt for prompt in (prepared.prompt, prepared.negative) if prompt is not None]
    texts = [len(prompt.ids) - model.entry.template.drop for prompt in prompts]
    return [Length(image, text) for text in texts] * pictures


@torch.inference_mode()
def encode_prompts(model: Model, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
    """`Conditions.text` and `.negative`, where they are not remembered."""
    text = _encode_text(model, prepared.prompt)
    return text, None if prepared.negative is None else _encode_text(model, prepared.negative)


@torch.inference_mode()
def encode_references(model: Model, prepared: Prepared) -> Tensor:
    """`Conditions.references`, where they are not remembered."""
    channels = model.transformer.config.in_channels
    nothing = torch.empty(0, channels, device=model.device, dtype=model.dtype)
    return torch.cat([nothing, *(_encode_picture(model, found) for found in prepared.references)])


def check_prompt(model: Model, prompt: str, field: str) -> None:
    """Refuses a prompt that the model cannot read, without running the model.

    Raises:
        InvalidRequest: more than `MAX_PROMPT_TOKENS` tokens, or one of the model's control tokens,
            which would end the template or announce a picture that is not there.
    """
    ids = model.tokenizer.ids(prompt)
    if len(ids) > MAX_PROMPT_TOKENS:
        raise InvalidRequest(
            f"{len(ids)} tokens are too many; at most {MAX_PROMPT_TOKENS} are possible", field=field
        )
    control = set(ids) & model.tokenizer.control.keys()
    if control:
        token = model.tokenizer.control[min(control)]
        raise InvalidRequest(f"the control token {token} is not allowed here", field=field)


def as_reference(model: Model, image: Image.Image) -> Reference:
    """Reduces an RGB picture, as upstream's pipelines do; may be called from any thread."""
    ratio = image.width / image.height
    fit = functools.partial(image.resize, resample=Image.Resampling.LANCZOS)
    with ThreadPoolExecutor(1) as beside:  # Pillow lets go of the interpreter while it resizes
        fitting = beside.submit(fit, sizes.fit_area(model.entry.area, ratio))
        if model.entry.vision_area is not None:
            seen = fit(sizes.fit_area(model.entry.vision_area, ratio))
        fitted = fitting.result()
    if model.entry.vision_area is None:  # the first Edit model shows both the same picture
        seen = fitted
    return Reference(ratio, seen, torch.from_numpy(np.array(fitted)), _hash(fitted, seen))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To `size` (width, height), as upstream's `VaeImageProcessor`."""
    return image.resize(size, Image.Resampling.LANCZOS)


def _hash(*images: Image.Image) -> bytes:
    """SHA-256, so that nobody can make two pictures that are taken for each other."""
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.width} {image.height} ".encode())
        found.update(image.tobytes())
    return found.digest()


def _encode_text(model: Model, prompt: Prompt) -> Tensor:
    """The text encoder's last hidden states without the template's head: (tokens, width)."""

    def run() -> Tensor:
        hidden: Tensor = with_room(
            model.make_room, lambda: model.text_encoder(prompt.ids, prompt.patches, prompt.grids)
        )
        return hidden[model.entry.template.drop :].to(model.dtype)

    return model.encodings.get(b"prompt" + prompt.key, run, model.device)


def _tokenise(model: Model, text: str, grids: Sequence[Grid]) -> Tensor:
    """Token ids, (tokens). One `<|image_pad|>` becomes as many as its picture has vision tokens."""
    *parts, rest = text.split(_IMAGE_PAD)
    counts = [rows * columns // model.patching.merge**2 for rows, columns in grids]
    expanded = [part + _IMAGE_PAD * count for part, count in zip(parts, counts, strict=True)]
    return torch.tensor(model.tokenizer.ids("".join(expanded) + rest))


def _encode_picture(model: Model, reference: Reference) -> Tensor:
    """One reference as normalised, packed latents: (tokens, channels)."""

    def run() -> Tensor:
        height, width, _ = reference.pixels.shape
        pixels = reference.pixels.to(model.device).permute(2, 0, 1)[None]
        # In the stock processor's order, so that they round alike.
        pixels = (2 * (pixels.float() / 255) - 1).to(model.dtype).contiguous()
        latents = through_vae(model, width * height, lambda tile: model.vae.encode(pixels, tile))
        mean, deviation = statistics(model.vae, model.device, model.dtype)
        return pack((latents - mean) / deviation)

    return model.encodings.get(b"picture" + reference.key, run, model.device)


def pack(latents: Tensor) -> Tensor:
    """(1, channels, rows, columns) to (rows/2 · columns/2, 4 · channels): 2×2 patches."""
    _, channels, rows, columns = latents.shape
    patches = latents.view(channels, rows // 2, 2, columns // 2, 2)
    return patches.permute(1, 3, 0, 2, 4).reshape(rows // 2 * columns // 2, 4 * channels)


def unpack(tokens: Tensor, shape: Shape) -> Tensor:
    """The inverse of `pack`, for a picture of `shape` in tokens."""
    _, rows, columns = shape
    channels = tokens.shape[-1] // 4
    patches = tokens.view(rows, columns, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return patches.reshape(1, channels, 2 * rows, 2 * columns)
