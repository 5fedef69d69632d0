"""At full size on a card: our forward against diffusers' module. Run by `make test-gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from image_worker.bench.forward import ours, quantise, random_model, random_row, relative, stock
from image_worker.model.transformer import velocities

pytestmark = pytest.mark.gpu

# Between our fused kernels in bf16 and the stock module in bf16: each rounds in other places.
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = random_model()
    yield made
    del made
    torch.cuda.empty_cache()


def test_bf16_equals_stock_alone_and_in_company(model: Any) -> None:
    served = ours(model, fp8=False, int8_attention=False)
    rows = [random_row(1024, 1), random_row(512, 2, text=91, seed=2), random_row(512, 0, text=7)]
    for row, found in zip(rows, velocities(served, rows), strict=True):
        assert torch.isfinite(found).all()
        assert relative(found, stock(model, row)) <= BF16_TOLERANCE
        assert relative(velocities(served, [row])[0], found) <= BF16_TOLERANCE


def test_few_bits_are_hardly_further_from_bf16_than_stock_nf4(model: Any) -> None:
    rows = [random_row(1024, 1), random_row(512, 0, text=91, seed=2)]
    exact = [stock(model, row) for row in rows]
    in_fp8 = copy.deepcopy(model)
    quantise(in_fp8, "fp8")
    quantise(model)  # the module's last use
    limit = 1.15 * relative(stock(model, rows[0]), exact[0])
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    for weights in (in_fp8, model):
        for int8_attention in (False, True)[: 1 + is_hopper]:
            served = ours(weights, fp8=True, int8_attention=int8_attention)
            for found, expected in zip(velocities(served, rows), exact, strict=True):
                assert relative(found, expected) <= limit
