"""Training data, made ahead: edits drawn by many processes, then rendered and encoded on the card.

All of it is kept in the card's memory, so that a training step neither renders nor encodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.miniature import forward
from tools.miniature.edits import FILTERS, Edit, training_edit
from tools.miniature.render import (
    apply_filters,
    draw,
    outline_everything,
    pack,
    round_8_bit,
)

SHARD = 1024


@dataclass(frozen=True)
class Shard:
    """Edits of one number of pictures, without anything but numbers and sentences.

    before, after, reference: packed scenes (edits, NUMBERS); reference is empty without one.
    """

    instructions: list[str]
    before: np.ndarray
    after: np.ndarray
    reference: np.ndarray
    filters: np.ndarray

    def __len__(self) -> int:
        return len(self.instructions)


def shard_of(edits: Sequence[Edit]) -> Shard:
    """Edits, packed."""
    return Shard(
        [edit.instruction for edit in edits],
        pack([edit.before for edit in edits]),
        pack([edit.after for edit in edits]),
        pack([edit.reference for edit in edits if edit.reference]),
        np.array([FILTERS.index(edit.filter) for edit in edits]),
    )


def _make_shard(kinds: Sequence[str], seed: int) -> Shard:
    random = Random(seed)
    return shard_of([training_edit(random, kinds) for _ in range(SHARD)])


def make_shards(kinds: Sequence[str], count: int, seed: int) -> Iterator[Shard]:
    """`count` shards of training edits, as other processes finish them."""
    workers = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_make_shard, kinds, seed * 1_000_000 + n) for n in range(count)]
        for job in jobs:
            yield job.result()


@dataclass(frozen=True)
class Drawn:
    """A shard's pictures in [0, 1]: what the model is shown (edits, pictures, 3, SIDE, SIDE), and
    the right answers (edits, 3, SIDE, SIDE)."""

    shown: Tensor
    answers: Tensor


_COMPILED_DRAW = torch.compile(draw, dynamic=False)


def _draw(rows: Tensor) -> Tensor:
    """Compiled where that pays: for whole shards on a card."""
    return _COMPILED_DRAW(rows) if rows.is_cuda and len(rows) == SHARD else draw(rows)


def draw_shard(shard: Shard, device: torch.device, *, style: bool = False) -> Drawn:
    """Renders a shard. With `style`, the answers are in the style of the style LoRA."""
    before, after, reference, filters = (
        torch.from_numpy(array).to(device)
        for array in (shard.before, shard.after, shard.reference, shard.filters)
    )
    answers = apply_filters(_draw(after), filters)
    if style:
        answers = outline_everything(answers, after, filters)
    shown = [before, reference] if len(reference) else [before]
    pictures = torch.stack([_draw(rows) for rows in shown], dim=1)
    return Drawn(round_8_bit(pictures), round_8_bit(answers))


@dataclass(frozen=True)
class Pairs:
    """Encoded edits on the card, N of them with P pictures each.

    ids (N, tokens) and lengths (N): the prompts; seen (N, P, 3, SIDE, SIDE) uint8: what the text
    encoder sees; shown (N, P · tokens, channels) and answers (N, tokens, channels): latents.
    """

    layout: forward.Layout
    ids: Tensor
    lengths: Tensor
    seen: Tensor
    shown: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.ids, self.lengths, self.seen, self.shown, self.answers

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return Pairs(self.layout, *(part[rows] for part in self.parts))


Encoder = Callable[[Tensor], Tensor]  # pictures in [0, 1] to latent tokens (B, tokens, channels)


def encode_shard(
    shard: Shard, encoder: Encoder, tokenizer: Any, device: torch.device, *, style: bool = False
) -> Pairs:
    """Draws and encodes a shard."""
    drawn = draw_shard(shard, device, style=style)
    pictures = drawn.shown.shape[1]
    layout = forward.layout(tokenizer, pictures, device)
    ids, lengths = layout.tokens(tokenizer(shard.instructions).input_ids)
    return Pairs(
        layout,
        ids.to(device),
        lengths.to(device),
        (drawn.shown * 255).round().to(torch.uint8),
        encoder(drawn.shown.flatten(0, 1)).unflatten(0, (-1, pictures)).flatten(1, 2),
        encoder(drawn.answers),
    )


def encode_shards(
    shards: Iterable[Shard],
    count: int,
    encoder: Encoder,
    tokenizer: Any,
    device: torch.device,
    *,
    style: bool = False,
) -> Pairs:
    """Draws and encodes `count` shards, as they come, into tensors of the full size.

    They take much of the card's memory: there is no room to collect them and copy them together.
    """
    pairs: Pairs | None = None
    for number, shard in enumerate(shards):
        part = encode_shard(shard, encoder, tokenizer, device, style=style)
        if pairs is None:
            pairs = Pairs(part.layout, *(_room(tensor, count * SHARD) for tensor in part.parts))
        rows = slice(number * SHARD, (number + 1) * SHARD)
        for whole, tensor in zip(pairs.parts, part.parts, strict=True):
            whole[rows] = tensor
    assert pairs is not None
    return pairs


def _room(part: Tensor, count: int) -> Tensor:
    return torch.empty(count, *part.shape[1:], dtype=part.dtype, device=part.device)
