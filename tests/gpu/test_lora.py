"""At full size on a card: a LoRA beside weights, against diffusers' module that has it merged."""

from __future__ import annotations

import copy

import pytest
import torch

from image_worker.bench.random_lora import random_lora
from image_worker.bench.random_model import CARD, quantise, random_model, random_row
from image_worker.bench.ways import ours, relative, stock
from image_worker.compute import Compute, possible
from image_worker.model.adapters import Adapter
from image_worker.model.transformer import velocities
from image_worker.settings import Precision

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("bf16", "bf16"), ("fp8", "fp8"), ("4bit", "bf16"), ("4bit", "fp8"), ("4bit", "int8")],
)
def test_beside_the_weights_is_merged(precision: Precision, compute: Compute) -> None:
    if compute not in possible(precision, torch.cuda.get_device_capability(), bf16=True):
        pytest.skip(f"products in {compute} are not for this card")
    model, row = random_model(), random_row(1024, 1)
    quantised = copy.deepcopy(model)
    quantise(quantised.transformer_blocks, precision)
    served = ours(quantised, compute)
    del quantised
    lora = random_lora(model.config, rank=20, scale=0.5)
    adapter = Adapter.of("a", [(lora, 1.0)], served.reads, CARD, torch.bfloat16)
    found = velocities(served, [row], adapter)[0]
    plain, without = velocities(served, [row])[0], stock(model, [row])[0]
    for path, pair in lora.pairs.items():
        layer = model.get_submodule(path)
        layer.weight.copy_(pair.add_to(layer.weight))
    expected = stock(model, [row])[0]
    assert relative(found, expected) <= 1.5 * relative(plain, without)
    assert relative(without, expected) > 0.15, "it does something"
