"""Products of activations and weights: how a layer multiplies, whatever format its weights have.

Prompts and pictures have weights of their own; what comes of both stands side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.kernels.reference import LARGEST, LEAST_AMAX, Quantised
from image_worker.model.formats.fp8 import Fp8Linear


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
    """Layers that multiply in a way of their own, as bitsandbytes' do."""

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


class Nf4(nn.Module):
    """The same product in both streams, with NF4 weights that are decoded to FP8 or int8 each time.

    Weights (rows, columns) of layers of one shape, one below the other: first those for pictures,
    then as many for prompts. All are decoded at once, since every launch takes its time; the
    prompts' last, with which the product begins: they are still in the card's cache.

    codes (rows, columns / 2) uint8, the earlier value in the higher half; scales (rows,
    columns / 64) uint8, which are numbers of `levels` (256); scales_of_scales (layers, a layer's
    scales / 256, rounded up) and offsets (layers), float32: a block's scale is its level times its
    scale of scales, plus the offset. row_scales (rows, 1) float32: what to multiply each decoded
    row by.
    """

    def __init__(
        self, layers: Sequence[Any], scratch: Scratch, ops: Any, round_to: torch.dtype
    ) -> None:
        """layers: bitsandbytes' `Linear4bit`; round_to: FP8 or int8."""
        super().__init__()
        states = [layer.weight.quant_state for layer in layers]
        rows, columns = states[0].shape
        self.codes = _buffer([layer.weight.view(rows, columns // 2) for layer in layers])
        self.scales = _buffer([state.absmax.view(rows, -1) for state in states])
        self.levels = nn.Buffer(states[0].state2.code.float())
        self.scales_of_scales = nn.Buffer(torch.stack([state.state2.absmax for state in states]))
        self.offsets = nn.Buffer(torch.stack([state.offset.float() for state in states]))
        self.grid = nn.Buffer(states[0].code.float())
        self.row_scales = _buffer([_largest(state) / LARGEST[round_to] for state in states])
        self.bias = _buffer([layer.bias for layer in layers])
        self.round_to = round_to
        self._ops, self._scratch = ops, scratch
        scratch.reserve(self.codes.numel() * 2)

    def forward(self, x: Quantised, text_tokens: int) -> Tensor:
        """As `Pair.forward`."""
        weight = self._ops.decode_nf4(self, self._scratch.memory)
        found: Tensor = self._ops.multiply(x, text_tokens, weight, self.row_scales, self.bias)
        return found


class Scratch:
    """Memory for one product's decoded weights, shared by all: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> None:
        """Makes room for `size` bytes."""
        if size > len(self.memory):
            self.memory = torch.empty(size, dtype=torch.uint8, device=self.memory.device)


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's weight as it is stored, and what to multiply each row by, (rows, 1) float32."""
    if isinstance(layer, Fp8Linear):
        return layer.weight, layer.scales
    largest: Tensor = layer.state.SCB  # of a Linear8bitLt
    return layer.state.CB, largest.float().view(-1, 1) / LARGEST[torch.int8]


def _largest(state: Any) -> Tensor:
    """The largest absolute value of each row, (rows, 1) float32, above 0: NF4's grid ends at ±1."""
    from bitsandbytes.functional import dequantize_blockwise

    if state.absmax.is_meta:
        return torch.empty(state.shape[0], 1, device="meta")
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.view(state.shape[0], -1).amax(dim=1, keepdim=True).float().clamp(min=LEAST_AMAX)


def _buffer(tensors: Sequence[Tensor]) -> nn.Buffer:
    whole = tensors[0].detach() if len(tensors) == 1 else torch.cat([t.detach() for t in tensors])
    return nn.Buffer(whole)
