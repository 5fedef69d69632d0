"""A LoRA of every layer that trainers change, of random numbers on the card: to measure."""

from __future__ import annotations

from typing import Any

import torch

from image_worker.bench.random_model import CARD
from image_worker.model.adapters import Adapter, is_of_timestep
from image_worker.model.configs import TransformerConfig
from image_worker.model.lora import Lora, LoraPair
from image_worker.model.lora_format import IN_BLOCK
from image_worker.model.shapes import expected
from image_worker.model.transformer import Transformer


def random_lora(config: Any, rank: int, scale: float = 0.1) -> Lora:
    """Of that rank in every layer of every block that does not see the timestep alone.

    config: diffusers' or ours, of the transformer; scale: about by how much weights change.
    """
    parsed = TransformerConfig.parse(dict(config))
    _, shapes = expected(parsed)
    generator = torch.Generator(CARD).manual_seed(0)
    pairs = {}
    for number in range(parsed.num_layers):
        for name in IN_BLOCK:
            path = f"transformer_blocks.{number}.{name}"
            if is_of_timestep(path):
                continue
            rows, columns = shapes[f"{path}.weight"]
            down, up = (
                torch.randn(shape, generator=generator, device=CARD)
                for shape in ((rank, columns), (rows, rank))
            )
            pairs[path] = LoraPair(down * columns**-0.5, up * rank**-0.5, scale)
    return Lora("random", pairs)


def random_adapter(transformer: Transformer, rank: int) -> Adapter:
    """It, for that transformer."""
    lora = random_lora(transformer.config, rank)
    return Adapter.of("random", [(lora, 1.0)], transformer.reads, CARD, torch.bfloat16)
