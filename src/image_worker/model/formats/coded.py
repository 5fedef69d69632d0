"""Weights that are decoded before each product, whatever they are stored as.

A format has a class of its own for them, which only knows how they become a tile of numbers. How
these are multiplied is not its concern: `linear.Decoded` does it, in the type that the card is best
at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional


class Coded(nn.Module, ABC):
    """Weights (rows, columns) of layers of one shape and kind, one layer below the other.

    All that they are decoded from is in buffers, which may be on the meta device.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def kind(self) -> Hashable:
        """What is alike of weights that can be stacked, beside their shapes."""
        return type(self)

    @classmethod
    @abstractmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """All of them, of one shape and kind, as one."""

    @abstractmethod
    def decode(self, into: Tensor, row_scales: Tensor | None = None) -> None:
        """The weights into (rows, columns), contiguous, rounded to its type from float32.

        row_scales (rows, 1) float32, for FP8 and int8: what rows are divided by before they are
        rounded, and are to be multiplied by when they are used.
        """

    def largest(self) -> Tensor:
        """Each row's largest absolute value, (rows, 1) float32."""
        rows, columns = self.shape
        found = next(self.buffers())
        whole = torch.empty(rows, columns, dtype=torch.float32, device=found.device)
        self.decode(whole)
        return whole.abs_().amax(dim=1, keepdim=True)

    @property
    def is_meta(self) -> bool:
        """Whether it is only a place for weights that will be read."""
        return next(self.buffers()).is_meta


class CodedLinear(nn.Module):
    """A linear layer that decodes its weight (out, in) at every product, to its input's type.

    weight: of this one layer; bias (out) or None.
    """

    def __init__(self, weight: Any) -> None:
        """weight: a `Coded`."""
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None = None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's type."""
        weight = x.new_empty(self.weight.shape)
        self.weight.decode(weight)
        return functional.linear(x, weight, self.bias)
