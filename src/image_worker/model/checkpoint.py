"""A file with a transformer's weights, in whatever format: what is asked of it."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Checkpoint(Protocol):
    """Names are those of diffusers' `QwenImageTransformer2DModel`, whatever the file calls them."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def label(self) -> str:
        """Its format, for people."""

    @property
    def lightning_steps(self) -> int | None:
        """Of the Lightning LoRA that is merged in it, by its metadata; None: they do not say."""

    @property
    def linears(self) -> Set[str]:
        """Paths of its linear layers, all of which have biases; modulation's are among them."""

    @property
    def others(self) -> Set[str]:
        """Names of all other tensors."""

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer as it serves, in the file's own format, with its bias: a `CodedLinear`, an
        `Fp8Linear` or an `nn.Linear`.

        On the meta device nothing is read. dtype: of the bias, and of weights that are not coded.

        Raises:
            ModelMismatch: what is read is damaged: numbers that are not finite, ends too early.
        """

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """A layer's weight (out, in) and bias (out) as numbers: float32, or narrower if exact.

        device: where to decode them, and where they are then.
        """

    def other(self, name: str) -> Tensor:
        """Any other tensor, on the host, in the file's type."""

    def stored_bytes(self, path: str) -> int:
        """Of a linear layer as it serves, without reading it."""
