"""GGUF: weights in blocks, as ggml and llama.cpp store them, in one of many types.

A type's name says how many bits a value has: `Q4_0` and `Q8_0` have one scale for 32 values, `Q4_1`
an offset, too; `Q2_K` to `Q6_K` have 256 values in a block, whose neighbours share scales that are
quantised themselves. They are decoded by `kernels/`; nothing here quantises.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from image_worker.kernels import gguf_blocks, operations
from image_worker.model.formats.coded import Coded
from image_worker.model.packed import joined

_PIECE = 1 << 22  # values that are decoded at a time, where each is looked at once


class GgufWeight(Coded):
    """Weights (rows, columns) of layers of one shape, one layer below the other.

    data (rows, bytes of a row) uint8: each row's blocks, as they are in the file; tensor_type: of
    `gguf_blocks.TYPES`; block: values, and bytes, of a block.
    """

    def __init__(self, data: Tensor, tensor_type: str, block: tuple[int, int]) -> None:
        super().__init__()
        self.data = nn.Buffer(data)
        self.tensor_type = tensor_type
        self.block = block

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """All of them, of one shape and type, as one."""
        data = joined([weight.data for weight in weights])
        return cls(data, weights[0].tensor_type, weights[0].block)

    @property
    def kind(self) -> Hashable:
        """As of `Coded`."""
        return type(self), self.tensor_type

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, stored = self.data.shape
        values, size = self.block
        return rows, stored // size * values

    def decode(self, into: Tensor, row_scales: Tensor | None = None) -> None:
        """As of `Coded`."""
        operations(into.device).decode_gguf(self, into, row_scales)

    def largest(self) -> Tensor:
        """As of `Coded`, without all of it in 32 bits at once."""
        rows, columns = self.shape
        found = torch.empty(rows, 1, dtype=torch.float32, device=self.data.device)
        step = max(1, _PIECE // columns)
        for first in range(0, rows, step):
            piece = slice(first, first + step)
            part = GgufWeight(self.data[piece], self.tensor_type, self.block)
            found[piece] = super(GgufWeight, part).largest()
        return found

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        if self.tensor_type in gguf_blocks.NUMBERS:
            numbers = [self.data.view(gguf_blocks.NUMBERS[self.tensor_type])]
        else:
            numbers = gguf_blocks.scales(self.data.view(-1, self.block[1]), self.tensor_type)
        return all(bool(part.isfinite().all()) for part in numbers)
