"""The denoising loop, for a list of pictures that may differ in everything.

Each picture keeps its own prompt, references, size, seed, schedule and guidance; being in a batch
with others changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from image_worker.edit.batching import Length, Limits, shares
from image_worker.edit.conditions import Conditions
from image_worker.edit.schedule import sigmas
from image_worker.edit.sizes import tokens
from image_worker.errors import BrokenPicture, OutOfMemory
from image_worker.model.adapters import Adapter
from image_worker.model.build import Model
from image_worker.model.embeddings import Shape
from image_worker.model.memory import with_room
from image_worker.model.transformer import Row, velocities

Progress = Callable[[int, int], None]


@dataclass
class Picture:
    """One picture on its way from noise.

    latents: (tokens, channels) in the model's type, replaced step by step; levels: its schedule,
    one more than it has steps; modulation: what the transformer made for that schedule, held so
    that it stays; step: how many are done; velocity: of the last one; adapter: its LoRAs.
    """

    conditions: Conditions
    shape: Shape
    latents: Tensor
    levels: list[float]
    modulation: list[Tensor]
    cfg_scale: float
    step: int = field(default=0)
    velocity: Tensor | None = None
    adapter: Adapter | None = None

    @property
    def done(self) -> bool:
        """No noise is left."""
        return self.step == len(self.levels) - 1


def start(
    model: Model,
    conditions: Conditions,
    size: tuple[int, int],
    *,
    seed: int,
    steps: int,
    cfg_scale: float,
    adapter: Adapter | None = None,
) -> Picture:
    """A picture of pure noise, of `size` (width, height) in pixels. adapter: its LoRAs.

    The same seed gives the noise that diffusers draws on the CPU, so the picture is diffusers' too.

    Raises:
        InvalidRequest: the step count is impossible with the model's schedule.
    """
    shape = tokens(*size)
    _, rows, columns = shape
    levels = sigmas(model.sampler, steps, rows * columns)
    modulation = model.transformer.prepare(levels[:-1], adapter)
    channels = model.transformer.config.in_channels // 4
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(
        (1, 1, channels, 2 * rows, 2 * columns), generator=generator, dtype=model.dtype
    )
    patches = noise.view(channels, rows, 2, columns, 2).permute(1, 3, 0, 2, 4)
    latents = patches.reshape(rows * columns, 4 * channels).to(model.device)
    return Picture(conditions, shape, latents, levels, modulation, cfg_scale, adapter=adapter)


def denoise(model: Model, pictures: Sequence[Picture], progress: Progress | None = None) -> None:
    """Takes every picture to the end of its own schedule, in place.

    progress(step, of) is called after each pass over the pictures that are not done.

    Raises:
        BrokenPicture: the model's numbers overflowed.
        OutOfMemory: a picture does not fit the card's memory.
    """
    limits = Limits(len(pictures), model.plan.max_tokens)
    passes = max(len(picture.levels) - 1 for picture in pictures)
    for number in range(passes):
        step(model, [picture for picture in pictures if not picture.done], limits)
        if progress:
            progress(number + 1, passes)
    for picture in pictures:
        check(picture)


def check(picture: Picture) -> None:
    """Refuses a finished picture that is none.

    Raises:
        BrokenPicture: the model's numbers overflowed.
    """
    if not torch.isfinite(picture.latents).all():
        raise BrokenPicture(
            "the model's numbers overflowed; another PRECISION_MODE or BNB_COMPUTE may help"
        )


@torch.inference_mode()
def step(model: Model, pictures: Sequence[Picture], limits: Limits) -> list[int]:
    """One Euler step of each picture, of all or, where it raises, of none.

    Returns how many rows each forward had; rows with and without the prompt share one, those with
    other LoRAs do not. A forward for which memory runs out is split, and `limits` learns from it.

    Raises:
        OutOfMemory: the card does not hold even one row of them.
    """
    parts = [(row, picture.adapter) for picture in pictures for row in _rows(picture)]
    rows, adapters = [row for row, _ in parts], [adapter for _, adapter in parts]
    lengths = [Length(len(row.image), len(row.text)) for row in rows]
    outputs: dict[int, Tensor] = {}
    forwards = []
    waiting = shares(lengths, limits.tokens, adapters)
    while waiting:
        share = waiting.pop(0)
        sharing = [rows[number] for number in share]
        found = _forward(model, sharing, adapters[share[0]], alone=len(share) == 1)
        if found is None:
            torch.cuda.empty_cache()
            limits.learn(sum(lengths[number].total for number in share))
            waiting = [share[: len(share) // 2], share[len(share) // 2 :], *waiting]
            continue
        outputs.update(zip(share, found, strict=True))
        forwards.append(len(share))
    velocities = (outputs[number] for number in range(len(rows)))
    steps = [(picture, *_next(picture, velocities)) for picture in pictures]
    for picture, latents, velocity in steps:  # from here on, nothing is computed that could fail
        picture.latents, picture.velocity = latents, velocity
        picture.step += 1
    return forwards


def _forward(
    model: Model, rows: list[Row], adapter: Adapter | None, *, alone: bool
) -> list[Tensor] | None:
    """The rows' velocities; None if memory ran out and there is more than one of them."""
    try:
        return with_room(
            model.make_room if alone else model.adapters.clear,
            lambda: velocities(model.transformer, rows, adapter),
        )
    except OutOfMemory:
        if alone:
            raise
        return None


def _next(picture: Picture, velocities: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Its latents after a step, and the velocity that led there, from those of its rows."""
    velocity = next(velocities)
    if picture.cfg_scale > 1:
        velocity = guide(velocity, next(velocities), picture.cfg_scale)
    level, following = picture.levels[picture.step : picture.step + 2]
    return euler_step(picture.latents, velocity, level, following), velocity


def euler_step(latents: Tensor, velocity: Tensor, level: float, next_level: float) -> Tensor:
    """Latents at `next_level`, in their type, from latents and velocity at `level`.

    The difference is a float32 tensor, not a number, because the product then rounds as in
    diffusers' scheduler: a bf16 picture equals upstream's.
    """
    change = torch.tensor(next_level) - level  # on the CPU: nobody waits for the card
    return (latents.float() + change * velocity).to(latents.dtype)


def _rows(picture: Picture) -> Iterator[Row]:
    """The picture with its prompt and, with guidance, with its negative prompt."""
    conditions = picture.conditions
    image = torch.cat([picture.latents, conditions.references])
    shapes = (picture.shape, *conditions.shapes)
    level = picture.levels[picture.step]
    yield Row(image, shapes, conditions.text, level)
    if picture.cfg_scale > 1:
        assert conditions.negative is not None
        yield Row(image, shapes, conditions.negative, level)


def guide(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, rescaled to the length of the guided velocity, token by token.

    All (tokens, channels). As Qwen-Image's pipelines do it, against over-saturation.
    """
    combined = without + scale * (with_prompt - without)
    length = torch.norm(with_prompt, dim=-1, keepdim=True)
    rescaled: Tensor = combined * (length / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled
