"""Products of activations and weights: how a layer multiplies, whatever format its weights have.

Prompts and pictures have weights of their own; what comes of both stands side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.kernels.reference import (
    LARGEST,
    LEAST_AMAX,
    Activation,
    Quantised,
    streams,
)
from image_worker.model.formats.coded import Coded, CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.packed import joined


class Plain(nn.Module):
    """Layers in a 16-bit or wider type, as one: their outputs side by side."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _buffer([layer.weight for layer in layers])
        self.bias = _buffer([layer.bias for layer in layers])

    def forward(self, x: Tensor, into: Tensor) -> None:
        """Into (N, out) from x (N, in)."""
        torch.addmm(self.bias, x, self.weight.t(), out=into)


class Modules(nn.Module):
    """Layers that multiply in a way of their own, as bitsandbytes' in 8 bits do."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, into: Tensor) -> None:
        """Into (N, out) from x (N, in)."""
        torch.cat([layer(x) for layer in self.layers], dim=1, out=into)


class Pair(nn.Module):
    """The same product in both streams, each with weights of its own."""

    round_to: torch.dtype | None = None

    def __init__(self, image: Plain | Modules, text: Plain | Modules, width: int) -> None:
        super().__init__()
        self.text, self.image = text, image
        self._width = width

    def forward(self, x: Tensor, text_tokens: int) -> Tensor:
        """(N, out) from x (N, in), of which the first are prompts' tokens."""
        into = x.new_empty(len(x), self._width)
        if text_tokens:
            self.text(x[:text_tokens], into[:text_tokens])
        self.image(x[text_tokens:], into[text_tokens:])
        return into


class W8A8(nn.Module):
    """The same product in both streams, of weights and activations in FP8 or int8.

    weight (rows, columns): the pictures', below them the prompts'; scales (rows, 1) float32: what
    to multiply each row by.
    """

    def __init__(self, layers: Sequence[Any], ops: Any) -> None:
        """layers: `Fp8Linear` or bitsandbytes' `Linear8bitLt`, with biases; first for pictures."""
        super().__init__()
        weights = [_rows(layer) for layer in layers]
        self.weight = _buffer([values for values, _ in weights])
        self.scales = _buffer([scales for _, scales in weights])
        self.bias = _buffer([layer.bias for layer in layers])
        self.round_to: torch.dtype = self.weight.dtype
        self._ops = ops

    def forward(self, x: Quantised, text_tokens: int) -> Tensor:
        """As `Pair.forward`."""
        found: Tensor = self._ops.multiply(x, text_tokens, self.weight, self.scales, self.bias)
        return found


class Decoded(nn.Module):
    """The same product in both streams, with weights that are decoded each time.

    weights: layers for pictures, below them as many for prompts; those of one kind are decoded at
    once, since every launch takes its time. The prompts' come last, with which the product begins:
    they are still in the card's cache. row_scales (rows, 1) float32: what to multiply each row by
    that is decoded to FP8 or int8; None where rows are decoded to the activations' own type.
    """

    row_scales: Tensor | None

    def __init__(
        self, layers: Sequence[Any], scratch: Scratch, ops: Any, round_to: torch.dtype | None
    ) -> None:
        """layers: `CodedLinear`, with biases; round_to: FP8, int8, or None."""
        super().__init__()
        self.weights = nn.ModuleList(_stacked([layer.weight for layer in layers]))
        row_scales = _row_scales(self.weights, round_to) if round_to else None
        self.register_buffer("row_scales", row_scales)
        self.bias = _buffer([layer.bias for layer in layers])
        self.shape = sum(layer.out_features for layer in layers), layers[0].in_features
        self.round_to = round_to
        self._ops, self._scratch = ops, scratch
        scratch.reserve(*self.shape)

    def forward(self, x: Activation, text_tokens: int) -> Tensor:
        """As `Pair.forward`."""
        weight = self._scratch.matrix(*self.shape)
        self.decode(weight)
        if isinstance(x, Quantised):
            found: Tensor = self._ops.multiply(x, text_tokens, weight, self.row_scales, self.bias)
            return found
        into = x.new_empty(len(x), len(weight) // 2)
        for tokens, rows in streams(text_tokens, weight):
            torch.addmm(self.bias[rows], x[tokens], weight[rows].t(), out=into[tokens])
        return into

    def decode(self, into: Tensor) -> None:
        """All weights, one below the other, into (rows, columns)."""
        first = 0
        weight: Any
        for weight in self.weights:
            rows = slice(first, first + weight.shape[0])
            weight.decode(into[rows], None if self.row_scales is None else self.row_scales[rows])
            first = rows.stop


class Scratch:
    """Memory for one product's decoded weights, shared by all: they run one after the other."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: of decoded weights."""
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, rows: int, columns: int) -> None:
        """Makes room for a matrix."""
        if rows * columns > len(self._memory):
            self._memory = self._memory.new_empty(rows * columns)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """(rows, columns), holding anything."""
        return self._memory[: rows * columns].view(rows, columns)


def product_of(
    image: Sequence[Any],
    text: Sequence[Any],
    scratch: Scratch,
    ops: Any,
    round_to: torch.dtype | None,
) -> Pair | W8A8 | Decoded:
    """The product of layers for pictures and of as many for prompts, by how they are stored.

    round_to: as of `Decoded`, and of layers that are stored in that type.
    """
    layers = (*image, *text)
    if all(isinstance(layer, CodedLinear) for layer in layers):
        return Decoded(layers, scratch, ops, round_to)
    if all(_is_stored_in(round_to, layer) for layer in layers):
        return W8A8(layers, ops)
    return Pair(_alike(image), _alike(text), sum(layer.out_features for layer in image))


def _is_stored_in(dtype: torch.dtype | None, layer: Any) -> bool:
    return isinstance(layer.weight, Tensor) and layer.weight.dtype == dtype


def _alike(layers: Sequence[Any]) -> Plain | Modules:
    """Layers of one stream, as they are."""
    if all(type(layer).forward is nn.Linear.forward for layer in layers):
        return Plain(layers)
    return Modules(layers)


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's weight as it is stored, and what to multiply each row by, (rows, 1) float32."""
    if isinstance(layer, Fp8Linear):
        return layer.weight, layer.scales
    largest: Tensor = layer.state.SCB  # of a Linear8bitLt
    if largest.is_meta:  # on which arithmetic imports torch's compiler
        return layer.state.CB, torch.empty(len(largest), 1, device="meta")
    return layer.state.CB, largest.float().view(-1, 1) / LARGEST[torch.int8]


def _stacked(weights: Sequence[Coded]) -> list[Coded]:
    """Neighbours of one kind and shape as one."""
    found = []
    for _, alike in itertools.groupby(weights, key=lambda weight: (weight.kind, weight.shape)):
        group = list(alike)
        found.append(group[0].stacked(group))
    return found


def _row_scales(weights: Iterable[Any], round_to: torch.dtype) -> Tensor:
    """By which each row's largest value, above 0, is the type's: (rows, 1) float32."""
    found = []
    for weight in weights:
        if weight.is_meta:  # on which arithmetic imports torch's compiler
            found.append(torch.empty(weight.shape[0], 1, device="meta"))
        else:
            found.append(weight.largest().clamp_(min=LEAST_AMAX) / LARGEST[round_to])
    return joined(found)


def _buffer(tensors: Sequence[Tensor]) -> nn.Buffer:
    whole = tensors[0].detach() if len(tensors) == 1 else joined([t.detach() for t in tensors])
    return nn.Buffer(whole)
