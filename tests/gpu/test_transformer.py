"""At full size on a card: our forward against diffusers' module. Run by `make test-gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from image_worker.bench.random_model import quantise, random_model, random_row
from image_worker.bench.stock_nf4 import use_bitsandbytes
from image_worker.bench.ways import ours, relative, stock
from image_worker.compute import Compute, possible
from image_worker.model.transformer import Row, velocities
from image_worker.settings import Precision

pytestmark = pytest.mark.gpu

# Between our fused kernels in bf16 and the stock module in bf16: each rounds in other places.
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = random_model()
    yield made
    del made
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def nf4_error(model: Any) -> float:
    """Of diffusers' module with NF4 weights."""
    quantised = copy.deepcopy(model)
    quantise(quantised.transformer_blocks, "4bit")
    use_bitsandbytes(quantised.transformer_blocks, torch.bfloat16)
    row = few_bit_rows()[0]
    return relative(stock(quantised, [row])[0], stock(model, [row])[0])


def few_bit_rows() -> list[Row]:
    return [random_row(1024, 1), random_row(512, 0, text=91, seed=2)]


@pytest.mark.parametrize("int8_attention", [False, True])
def test_bf16_equals_stock_alone_and_in_company(model: Any, int8_attention: bool) -> None:
    if int8_attention and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("attention in int8 is for Hopper")
    served = ours(model, int8_attention=int8_attention)
    rows = [random_row(1024, 1), random_row(512, 2, text=91, seed=2), random_row(512, 0, text=7)]
    for row, found in zip(rows, velocities(served, rows), strict=True):
        assert torch.isfinite(found).all()
        assert relative(found, stock(model, [row])[0]) <= BF16_TOLERANCE
        assert relative(velocities(served, [row])[0], found) <= BF16_TOLERANCE


@pytest.mark.parametrize(
    ("precision", "compute", "int8_attention"),
    [
        ("fp8", "fp8", False),
        ("fp8", "fp8", True),
        ("8bit", "int8", False),
        ("8bit", "int8", True),
        ("svdq", "bf16", False),
        ("svdq", "fp8", False),
        ("4bit", "bf16", False),
        ("4bit", "fp8", False),
        ("4bit", "fp8", True),
        ("4bit", "int8", False),
        ("4bit", "int8", True),
    ],
)
def test_few_bits_are_hardly_further_from_bf16_than_stock_nf4(
    model: Any,
    nf4_error: float,
    precision: Precision,
    compute: Compute,
    int8_attention: bool,
) -> None:
    capability = torch.cuda.get_device_capability()
    if compute not in possible(precision, capability, bf16=True):
        pytest.skip(f"products in {compute} are not for this card")
    if int8_attention and capability != (9, 0):
        pytest.skip("attention in int8 is for Hopper")
    quantised = copy.deepcopy(model)
    quantise(quantised.transformer_blocks, precision)
    served = ours(quantised, compute, int8_attention=int8_attention)
    rows = few_bit_rows()
    for row, found in zip(rows, velocities(served, rows), strict=True):
        assert relative(found, stock(model, [row])[0]) <= 1.15 * nf4_error
