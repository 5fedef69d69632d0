"""The denoising loop, for a list of pictures that may differ in everything.

Each picture keeps its own prompt, references, size, seed, schedule and guidance; being in a batch
with others changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from image_worker.edit.conditions import Conditions
from image_worker.edit.schedule import sigmas
from image_worker.edit.sizes import tokens
from image_worker.errors import BrokenPicture
from image_worker.model.build import Model
from image_worker.model.transformer import Row, Shape, velocities

Progress = Callable[[int, int], None]


@dataclass
class Picture:
    """One picture on its way from noise.

    latents: (tokens, channels) in the model's type, replaced step by step; levels: its schedule,
    one more than it has steps; step: how many are done.
    """

    conditions: Conditions
    shape: Shape
    latents: Tensor
    levels: list[float]
    cfg_scale: float
    step: int = field(default=0)

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
) -> Picture:
    """A picture of pure noise, of `size` (width, height) in pixels.

    The same seed gives the noise that diffusers draws on the CPU, so the picture is diffusers' too.

    Raises:
        InvalidRequest: the step count is impossible with the model's schedule.
    """
    shape = tokens(*size)
    _, rows, columns = shape
    levels = sigmas(model.sampler, steps, rows * columns)
    channels = model.transformer.config.in_channels // 4
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(
        (1, 1, channels, 2 * rows, 2 * columns), generator=generator, dtype=model.dtype
    )
    patches = noise.view(channels, rows, 2, columns, 2).permute(1, 3, 0, 2, 4)
    latents = patches.reshape(rows * columns, 4 * channels).to(model.device)
    return Picture(conditions, shape, latents, levels, cfg_scale)


@torch.inference_mode()
def denoise(model: Model, pictures: Sequence[Picture], progress: Progress | None = None) -> None:
    """Takes every picture to the end of its own schedule, in place.

    progress(step, of) is called after each pass over the pictures that are not done.

    Raises:
        BrokenPicture: the model's numbers overflowed.
    """
    model.placement.bring("transformer")
    passes = max(len(picture.levels) - 1 for picture in pictures)
    for number in range(passes):
        _step(model, [picture for picture in pictures if not picture.done])
        if progress:
            progress(number + 1, passes)
    for picture in pictures:
        if not torch.isfinite(picture.latents).all():
            raise BrokenPicture(
                "the model's numbers overflowed; another PRECISION_MODE or BNB_COMPUTE may help"
            )


def _step(model: Model, pictures: list[Picture]) -> None:
    """One Euler step of each picture. Rows with and without the prompt share a forward."""
    rows = [row for picture in pictures for row in _rows(picture)]
    outputs = (
        output
        for share in _shares(rows, model.plan.max_tokens)
        for output in velocities(model.transformer, share)
    )
    for picture in pictures:
        velocity = next(outputs)
        if picture.cfg_scale > 1:
            velocity = guide(velocity, next(outputs), picture.cfg_scale)
        picture.latents = euler_step(
            picture.latents,
            velocity,
            picture.levels[picture.step],
            picture.levels[picture.step + 1],
        )
        picture.step += 1


def euler_step(latents: Tensor, velocity: Tensor, level: float, next_level: float) -> Tensor:
    """Latents at `next_level`, in their type, from latents and velocity at `level`.

    The difference is a float32 tensor, not a number, because the product then rounds as in
    diffusers' scheduler: a bf16 picture equals upstream's.
    """
    change = torch.tensor(next_level, device=latents.device) - level
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


def _shares(rows: list[Row], max_tokens: int | None) -> Iterator[list[Row]]:
    """Splits rows, in order, so that no forward has more tokens, padding included, than fit."""
    share: list[Row] = []
    for row in rows:
        wider = max(len(r.image) + len(r.text) for r in [*share, row])
        if share and max_tokens is not None and wider * (len(share) + 1) > max_tokens:
            yield share
            share = []
        share.append(row)
    yield share


def guide(with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, rescaled to the length of the guided velocity, token by token.

    All (tokens, channels). As Qwen-Image's pipelines do it, against over-saturation.
    """
    combined = without + scale * (with_prompt - without)
    length = torch.norm(with_prompt, dim=-1, keepdim=True)
    rescaled: Tensor = combined * (length / torch.norm(combined, dim=-1, keepdim=True))
    return rescaled
