"""LoRAs that every job is edited with, where the weights' own format takes none merged into them.

What a job names is added on top of them, and they never leave the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from image_worker.model import adapters
from image_worker.model.adapters import Adapter
from image_worker.model.configs import TransformerConfig
from image_worker.model.lora import Lora


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
        return adapters.card_bytes([(lora, 1.0) for lora in self.loras], dtype)

    def adapter(self, blocks: int, device: torch.device, dtype: torch.dtype) -> Adapter:
        """blocks: how many the transformer has; dtype: what is computed in.

        Raises:
            ModelMismatch: values that dtype cannot hold.
            torch.OutOfMemoryError: the device cannot hold it.
        """
        scaled = [(lora, 1.0) for lora in self.loras]
        return Adapter.of(self.paths, scaled, blocks, device, dtype)
