"""Thin products beside a layer's own: `up @ (down @ x)`, for inputs in either stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from image_worker.errors import ModelMismatch
from image_worker.kernels import operations
from image_worker.kernels.reference import Activation, Quantised, quantise
from image_worker.model.lora import Lora

Scaled = tuple[Lora, float]  # a LoRA and what its change is multiplied by
Reads = Mapping[str, torch.dtype | None]  # of a block's products: what their inputs are rounded to

_MULTIPLE = 8  # of ranks, in which kernels read and write


@dataclass(frozen=True)
class Ups:
    """Of each layer which of the outputs and of the ranks are its own, and (out, rank)."""

    parts: tuple[tuple[slice, slice, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(up.nbytes for _, _, up in self.parts)

    def add_to(self, into: Tensor, low: Tensor) -> None:
        """Into (N, out), from low (N, ranks)."""
        for outputs, ranks, up in self.parts:
            into[:, outputs].addmm_(low[:, ranks], up.t())


@dataclass(frozen=True)
class LowRank:
    """What is added to layers that read the same and whose outputs stand side by side.

    down (ranks, in): of all layers and LoRAs.
    """

    down: Tensor
    ups: Ups

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.down.nbytes + self.ups.nbytes

    def add_to(self, into: Tensor, x: Tensor) -> None:
        """Into (N, out), which the layers made of x (N, in)."""
        self.ups.add_to(into, x @ self.down.t())


@dataclass(frozen=True)
class Change:
    """What is added to a product of both streams; None: nothing."""

    image: LowRank | None = None
    text: LowRank | None = None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(one.nbytes for one in (self.image, self.text) if one is not None)

    def add_to(self, into: Tensor, x: Activation, text_tokens: int) -> None:
        """Into (N, out), the product of x (N, in), of which the first are prompts' tokens."""
        if self.image is None and self.text is None:
            return
        assert isinstance(x, Tensor)
        if self.text is not None and text_tokens:
            self.text.add_to(into[:text_tokens], x[:text_tokens])
        if self.image is not None:
            self.image.add_to(into[text_tokens:], x[text_tokens:])


@dataclass(frozen=True)
class RoundedChange:
    """The same of inputs that are rounded to FP8 or int8, and `down` with them.

    Each of its numbers is the sum of two, the second what rounding took from the first, so that
    nothing to speak of is lost. down (4 · ranks, in): of pictures the first and the second, then of
    prompts; scales (4 · ranks, 1) float32; zeros (4 · ranks), in the type that is computed in.
    """

    down: Tensor
    scales: Tensor
    zeros: Tensor
    image: Ups
    text: Ups
    ops: Any

    @classmethod
    def of(cls, change: Change, round_to: torch.dtype) -> RoundedChange:
        """change: with at least one stream."""
        given = [change.image, change.text]
        some = next(one.down for one in given if one is not None)
        most = max(len(one.down) for one in given if one is not None)
        ranks = padded(most)
        halves = []
        for one in given:
            down = some[:0] if one is None else one.down
            whole = functional.pad(down.float(), (0, 0, 0, ranks - len(down)))
            first = quantise(whole, round_to)
            rest = whole - first.values.float() * first.scales
            halves += [first, quantise(rest, round_to)]
        return cls(
            torch.cat([half.values.view(torch.uint8) for half in halves]).view(round_to),
            torch.cat([half.scales for half in halves]),
            some.new_zeros(4 * ranks),
            _ups(change.image),
            _ups(change.text),
            operations(some.device),
        )

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        own = (self.down, self.scales, self.zeros)
        return sum(tensor.nbytes for tensor in own) + self.image.nbytes + self.text.nbytes

    def add_to(self, into: Tensor, x: Activation, text_tokens: int) -> None:
        """As of `Change`."""
        assert isinstance(x, Quantised)
        found = self.ops.multiply(x, text_tokens, self.down, self.scales, self.zeros)
        first, second = found.chunk(2, dim=1)
        low = first + second
        self.text.add_to(into[:text_tokens], low[:text_tokens])
        self.image.add_to(into[text_tokens:], low[text_tokens:])


def padded(ranks: int) -> int:
    """As many as kernels take."""
    return -(-ranks // _MULTIPLE) * _MULTIPLE


def _ups(change: LowRank | None) -> Ups:
    return Ups(()) if change is None else change.ups


@dataclass(frozen=True)
class Changes:
    """What is added to the products of a block."""

    qkv: Change | RoundedChange
    out: Change | RoundedChange
    up: Change | RoundedChange
    down: Change | RoundedChange


def added(
    product: str, changes: Sequence[Changes], into: Tensor, x: Activation, text_tokens: int
) -> Tensor:
    """`into`, to which all changes of the product of that name were added: as `Change.add_to`."""
    for one in changes:
        getattr(one, product).add_to(into, x, text_tokens)
    return into


def low_rank(
    names: Sequence[str], loras: Sequence[Scaled], device: torch.device, dtype: torch.dtype
) -> LowRank | None:
    """Of layers of one shape, in the order of their outputs; None: no LoRA changes any.

    Put together where it will lie, which takes a card no time.

    Raises:
        ModelMismatch: values that dtype cannot hold.
    """
    downs, ups, rank = [], [], 0
    for number, name in enumerate(names):
        pairs = [(lora.pairs[name], scale) for lora, scale in loras if name in lora.pairs]
        if not pairs:
            continue
        up = torch.cat(
            [pair.up.to(device).float() * (pair.scale * scale) for pair, scale in pairs], dim=1
        )
        outputs, own = len(up), up.shape[1]
        ups.append(
            (
                slice(number * outputs, (number + 1) * outputs),
                slice(rank, rank + own),
                _held(name, up, dtype),
            )
        )
        downs += [pair.down.to(device).float() for pair, _ in pairs]
        rank += own
    if not ups:
        return None
    return LowRank(_held(names[0], torch.cat(downs), dtype), Ups(tuple(ups)))


def _held(name: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
    found = wide.to(dtype)
    if not torch.isfinite(found).all():
        raise ModelMismatch(f"the change of {name} is too large for the type that is computed in")
    return found
