"""LoRAs that every job is edited with, where the weights' own format takes none merged into them.

What a job names is added on top of them, and they never leave the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from image_worker.model import adapters
from image_worker.model.adapters import Adapter, Timestep
from image_worker.model.configs import TransformerConfig
from image_worker.model.lora import Lora
from image_worker.model.low_rank import Reads, Scaled


@dataclass(frozen=True, eq=False)
class Beside:
    """Files that were read and checked, each of scale 1."""

    paths: tuple[Path, ...]
    loras: tuple[Lora, ...]

    @classmethod
    def read(cls, paths: Sequence[Path], config: TransformerConfig) -> Beside:
        """config: of the transformer that they are for.

        Raises:
            ModelMismatch: one is no LoRA, or does not fit the transformer.
        """
        loras = tuple(Lora.read(path) for path in paths)
        for lora in loras:
            adapters.check(lora, config)
        return cls(tuple(paths), loras)

    def card_bytes(self, dtype: torch.dtype) -> int:
        """What `adapter` takes on its device."""
        return adapters.card_bytes(self._scaled, dtype)

    @property
    def timestep(self) -> Timestep:
        """What they change of the layers that see the timestep only."""
        return Timestep(self.paths, self._scaled)

    def adapter(self, reads: Sequence[Reads], device: torch.device, dtype: torch.dtype) -> Adapter:
        """As of `Adapter.of`.

        Raises:
            ModelMismatch: values that dtype cannot hold.
            torch.OutOfMemoryError: the device cannot hold it.
        """
        return Adapter.of(self.paths, self._scaled, reads, device, dtype)

    @property
    def _scaled(self) -> list[Scaled]:
        return [(lora, 1.0) for lora in self.loras]
