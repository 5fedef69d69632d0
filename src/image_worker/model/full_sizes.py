"""The full-size models' sizes, from their architecture alone: nothing has to be downloaded.

All of the family have the same three components; `full_size/` in this package holds what their
configuration files say of shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from image_worker.catalog import ModelEntry
from image_worker.model import components, weights
from image_worker.model.placement import Shape, Sizes
from image_worker.settings import Precision, Settings

FOLDER = Path(__file__).parents[1] / "full_size"
ZERO_COND_T = ("edit-2511",)  # the catalogue's models that have it
LORA_RANK = 64  # of the published Lightning files
_BYTES = 2  # of a value in all of these files: bfloat16
# Of the VAE's file: what only joins frames is in it, too.
_VAE_BYTES = 253_785_062


@dataclass(frozen=True)
class FullSize:
    """A full-size model as a plan sees it.

    host: bytes that are served from the host's memory, at any precision; modulation: of layers that
    stay on disk; checkpoint, lora: of the files that are downloaded; transformer, text_encoder:
    those of the checkpoint that are theirs.
    """

    shape: Shape
    sizes: Mapping[Precision, Sizes]
    host: int
    modulation: int
    checkpoint: int
    transformer: int
    text_encoder: int
    lora: int

    def prepared(self, precision: Precision, *, whole: bool = False) -> int:
        """About how many bytes a folder of prepared weights takes. whole: without a checkpoint."""
        return self.sizes[precision].total + self.host + (self.modulation if whole else 0)


def configs_of(entry: ModelEntry) -> dict[str, dict[str, Any]]:
    """Each component's configuration, for a model of the catalogue."""
    configs = components.read_configs(FOLDER)
    configs["transformer"]["zero_cond_t"] = entry.name in ZERO_COND_T
    return configs


def full_size(entry: ModelEntry, settings: Settings) -> FullSize:
    """Of a model of the catalogue, or of another one of the same architecture.

    Modules are made without memory for their weights: it takes half a second.
    """
    encoder = weights.shapes_of(components.TEXT_ENCODER.empty(FOLDER / "text_encoder"))
    transformer = weights.shapes_of(components.TRANSFORMER.empty(FOLDER / "transformer"))
    embedding = sum(
        shape.numel() for name, shape in encoder.items() if components.TEXT_ENCODER.on_host(name)
    )
    on_disk = {
        name: shape
        for name, shape in transformer.items()
        if components.TRANSFORMER.on_disk(name.rpartition(".")[0])
    }
    # The checkpoint has the text encoder's output layer, too, which is as large as its embedding.
    of_encoder = _BYTES * (_count(encoder) + embedding)
    of_transformer = _BYTES * _count(transformer)
    return FullSize(
        shape=components.shape(entry, configs_of(entry)),
        sizes=components.sizes(FOLDER, settings, torch.bfloat16, has_weights=False),
        host=_BYTES * embedding,
        modulation=_BYTES * _count(on_disk),
        checkpoint=of_encoder + of_transformer + _VAE_BYTES,
        transformer=of_transformer,
        text_encoder=of_encoder,
        lora=_BYTES * _lora_values(transformer),
    )


def _count(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _lora_values(transformer: Mapping[str, torch.Size]) -> int:
    """Two matrices for each layer that Lightning changes: those that are quantised, too."""
    return sum(
        LORA_RANK * sum(shape)
        for name, shape in transformer.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and components.TRANSFORMER.quantised(name.removesuffix(".weight"))
    )
