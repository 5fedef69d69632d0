"""A LoRA of every layer that trainers change, of random numbers on the card: to measure."""

from __future__ import annotations

import torch

from image_worker.bench.random_model import CARD
from image_worker.model.adapters import Adapter, is_of_timestep
from image_worker.model.configs import TransformerConfig
from image_worker.model.lora import Lora, LoraPair
from image_worker.model.lora_format import IN_BLOCK
from image_worker.model.shapes import expected
from image_worker.model.transformer import Transformer


def random_adapter(transformer: Transformer, rank: int) -> Adapter:
    """Of that rank in every layer of every block that does not see the timestep alone."""
    _, shapes = expected(TransformerConfig.parse(dict(transformer.config)))
    pairs = {}
    for number in range(len(transformer.blocks)):
        for name in IN_BLOCK:
            path = f"transformer_blocks.{number}.{name}"
            if is_of_timestep(path):
                continue
            rows, columns = shapes[f"{path}.weight"]
            down, up = (
                torch.randn(shape, device=CARD) for shape in ((rank, columns), (rows, rank))
            )
            pairs[path] = LoraPair(down * columns**-0.5, up * rank**-0.5, 0.1)
    lora = [(Lora("random", pairs), 1.0)]
    return Adapter.of("random", lora, transformer.reads, CARD, torch.bfloat16)
