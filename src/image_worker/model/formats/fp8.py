"""FP8 (e4m3): one float32 scale for each row, so that its largest value is FP8's largest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from image_worker.kernels import operations, reference


class Fp8Linear(nn.Module):
    """A linear layer that widens its weight at every product, so that activations keep their type.

    weight (out, in) float8_e4m3fn; scales (out, 1) float32; bias (out) or None.
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias: nn.Parameter | None = None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in x's type."""
        weight = x.new_empty(self.weight.shape)
        operations(x.device).decode_fp8(self.weight, self.scales, weight)
        return functional.linear(x, weight, self.bias)


def encode(weight: Tensor, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """A layer that holds `weight` (out, in), quantised on the device it is on."""
    found = reference.quantise(weight, reference.FP8)
    return Fp8Linear(found.values, found.scales)


def empty(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """The same layer, its tensors on the meta device."""
    weight = torch.empty(rows, columns, dtype=reference.FP8, device="meta")
    return Fp8Linear(weight, torch.empty(rows, 1, dtype=torch.float32, device="meta"))


def size(rows: int, columns: int) -> int:
    """Bytes: one a value and four a row."""
    return rows * columns + 4 * rows
