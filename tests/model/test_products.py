"""The miniature's transformer with rounded activations, against diffusers' module.

That has the weights that ours stores, widened; what is between them is what the products round.
Errors are lengths of differences, relative to the length of what is expected.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_worker.bench.ways import relative
from image_worker.compute import Compute
from image_worker.kernels import fused
from image_worker.model import transformer as module
from image_worker.model.attention import Attention, Int8
from image_worker.model.components import TRANSFORMER
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from image_worker.settings import Precision
from tests import upstream
from tests.conftest import read_mini
from tests.model.rows import EXACT, ROWS, TOLERANCE, row
from tests.model.test_quantised import stored

CPU = torch.device("cpu")
ATTENTION_TOLERANCE = 0.2  # int8 attention's own share, of these random tokens
KINDS = {"8bit": "W8A8", "fp8": "W8A8", "svdq": "Decoded", "4bit": "Decoded"}


@torch.inference_mode()
def stock(source: Any, given: Row) -> Tensor:
    """The velocity by diffusers' module, with the weights that `source` stores."""
    for name, layer in list(source.transformer_blocks.named_modules()):
        if hasattr(layer, "in_features") and type(layer) is not nn.Linear:
            wide = nn.Linear(layer.in_features, layer.out_features)
            wide.weight, wide.bias = nn.Parameter(stored(layer)), layer.bias
            source.transformer_blocks.set_submodule(name, wide)
    return upstream.velocity(upstream.transformer(source), given)


def compare(
    precision: Precision,
    compute: Compute,
    rows: list[Row],
    attention: Attention | None = None,
    blocks: int = 7,
) -> list[float]:
    source = read_mini(TRANSFORMER, torch.float32, precision)
    del source.transformer_blocks[blocks:]
    served = Transformer(
        copy.deepcopy(source), CPU, torch.float32, round_to=ROUND_TO[compute], attention=attention
    ).eval()
    qkv = served.blocks[1].qkv
    assert type(getattr(qkv, "image", qkv)).__name__ == KINDS[precision]
    pairs = zip(velocities(served, rows), rows, strict=True)
    return [relative(found, stock(source, given)) for found, given in pairs]


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("8bit", "int8"), ("4bit", "int8"), ("fp8", "fp8"), ("4bit", "fp8"), ("svdq", "fp8")],
)
def test_rounded_products(precision: Precision, compute: Compute) -> None:
    for error in compare(precision, compute, ROWS):
        assert 0.005 < error <= TOLERANCE[compute], error


@pytest.mark.parametrize("precision", ["4bit", "svdq"])
def test_weights_in_4_bits_are_widened_exactly(precision: Precision) -> None:
    for error in compare(precision, "bf16", ROWS):
        assert error <= EXACT


@pytest.mark.parametrize(("precision", "compute"), [("8bit", "int8"), ("fp8", "fp8")])
def test_attention_in_int8_feeds_both(precision: Precision, compute: Compute) -> None:
    for error in compare(precision, compute, ROWS, Int8(CPU)):
        assert error <= ATTENTION_TOLERANCE + TOLERANCE[compute]


def test_the_cards_kernels_do_the_same(monkeypatch: Any) -> None:
    """In Triton's interpreter, which is slow: two blocks, few tokens."""
    monkeypatch.setattr(module, "operations", lambda device: fused)
    [error] = compare("8bit", "int8", [row(4, 0, 7, 1)], blocks=2)
    assert 0.003 < error <= TOLERANCE["int8"]
