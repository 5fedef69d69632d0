"""A file with a transformer's weights, in whatever format: what is asked of it."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

import torch
from torch import Tensor, nn

from image_worker.model.configs import TransformerConfig


class Checkpoint(Protocol):
    """Names are those of diffusers' `QwenImageTransformer2DModel`, whatever the file calls them.

    label: its format, for people; config: of the model that it belongs to, from its metadata or its
    shapes; lightning_steps: of the LoRA that is merged in it, None where there is none or nothing
    says so; linears: paths of its linear layers, all of which have biases, modulation's included;
    others: names of all other tensors.
    """

    label: str
    config: TransformerConfig
    lightning_steps: int | None
    linears: Set[str]
    others: Set[str]

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer as it serves, in the file's own format, with its bias: a `CodedLinear`, an
        `Fp8Linear` or an `nn.Linear`.

        On the meta device nothing is read. dtype: of the bias, and of weights that are not coded.

        Raises:
            ModelMismatch: what is read is damaged: numbers that are not finite, ends too early.
        """

    def full(self, path: str) -> tuple[Tensor, Tensor]:
        """A layer's weight (out, in) and bias (out) as numbers, on the host: float32 or narrower,
        if exact."""

    def other(self, name: str) -> Tensor:
        """Any other tensor, on the host, in the file's type."""

    def stored_bytes(self, path: str) -> int:
        """Of a linear layer as it serves, without reading it."""
