"""A file with a component's weights, in a format of its own: what is asked of it."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class Checkpoint(Protocol):
    """Names are those of the module that is filled (`Skeleton`, with diffusers' names, or
    `TextEncoder`), whatever the file calls them.
    """

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
        """Paths of the linear layers that serve in the file's format. Of a transformer these are
        all, modulation's among them, and all have biases.
        """

    @property
    def others(self) -> Set[str]:
        """Names of all other tensors."""

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The layer as it serves, in the file's own format, with its bias if it has one: a
        `CodedLinear`, an `Fp8Linear` or an `nn.Linear`.

        On the meta device nothing is read. dtype: of the bias, and of weights that are not coded.

        Raises:
            ModelMismatch: what is read is damaged: numbers that are not finite, ends too early.
        """

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """A layer's weight (out, in) and bias (out) as numbers: float32, or narrower if exact.

        Only a transformer's are asked for.

        device: where to decode them, and where they are then.
        """

    def other(self, name: str) -> Tensor:
        """Any other tensor, on the host, in the file's type, or in float32 if that is FP8."""

    def stored_bytes(self, path: str) -> int:
        """Of a linear layer as it serves, without reading it."""
