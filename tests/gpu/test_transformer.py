"""At full size on a card: our forward against diffusers' module. Run by `make test-gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from image_worker.bench.forward import quantise, random_model, random_row, relative, stock
from image_worker.model.transformer import Transformer, velocities

pytestmark = pytest.mark.gpu

# Between our fused kernels in bf16 and the stock module in bf16: each rounds in other places.
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = random_model()
    yield made
    del made
    torch.cuda.empty_cache()


def served(model: Any, *, fp8: bool) -> Transformer:
    return Transformer(copy.deepcopy(model), torch.device("cuda"), torch.bfloat16, fp8=fp8).eval()


def test_bf16_equals_stock_alone_and_in_company(model: Any) -> None:
    ours = served(model, fp8=False)
    rows = [random_row(1024, 1), random_row(512, 2, text=91, seed=2), random_row(512, 0, text=7)]
    for row, found in zip(rows, velocities(ours, rows), strict=True):
        assert torch.isfinite(found).all()
        assert relative(found, stock(model, row)) <= BF16_TOLERANCE
        assert relative(velocities(ours, [row])[0], found) <= BF16_TOLERANCE


def test_nf4_by_fp8_is_hardly_further_from_bf16_than_stock_nf4(model: Any) -> None:
    row = random_row(1024, 1)
    exact = stock(model, row)
    quantise(model)  # the module's last use
    theirs = relative(stock(model, row), exact)
    assert relative(velocities(served(model, fp8=True), [row])[0], exact) <= 1.15 * theirs
