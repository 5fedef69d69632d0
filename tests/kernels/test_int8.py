"""Products in int8: the kernel's, and torch's, are the exact ones, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, Quantised
from tests.kernels.test_fused import DEVICE, TOLERANCE, noise

# Tokens, columns, rows: of one tile and several, whole and not, as the miniature's and smaller.
SHAPES = [(1, 16, 8), (7, 128, 96), (128, 128, 256), (130, 200, 264), (300, 512, 128)]


def given(tokens: int, columns: int, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Activations, weight, its scales, bias; the largest values of int8 among them."""
    x = reference.quantise(noise(tokens, columns, dtype=dtype), torch.int8)
    weight = reference.quantise(noise(rows, columns, seed=1), torch.int8)
    return x, weight.values, weight.scales, noise(rows, dtype=dtype, seed=2)


def exact(x: Quantised, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    wide = (x.values.double() * x.scales) @ (weight.double() * scales).t()
    return wide + bias


@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multiply(shape: tuple[int, int, int], dtype: torch.dtype, ops: Any) -> None:
    x, weight, scales, bias = given(*shape, dtype)
    tokens, _, rows = shape
    room = torch.full((tokens + 2, rows + 8), 7.0, dtype=dtype, device=DEVICE)
    ops.multiply(x, weight, scales, bias, room[1:-1, :rows])
    found, expected = room[1:-1, :rows].double(), exact(x, weight, scales, bias)
    assert ((found - expected).abs() <= TOLERANCE[dtype] * expected.abs() + 1e-5).all()
    # Around the result nothing is written.
    assert (room[0] == 7).all() and (room[-1] == 7).all() and (room[:, rows:] == 7).all()


@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
def test_sums_do_not_overflow_and_are_exact(ops: Any) -> None:
    columns = 12288  # of the full model's widest product
    one = torch.ones(1, 1, device=DEVICE)
    values = torch.full((1, columns), 127, dtype=torch.int8, device=DEVICE)
    values[0, 0] = 126  # a float32 has no bits left for it
    weight = torch.full((8, columns), -127, dtype=torch.int8, device=DEVICE)
    into = torch.empty(1, 8, device=DEVICE)
    bias = torch.full((8,), float(127 * 127 * columns), device=DEVICE)
    ops.multiply(
        Quantised(values, one, torch.float32), weight, torch.ones(8, 1, device=DEVICE), bias, into
    )
    assert ((into - 127).abs() <= 16).all()  # half a step of float32 at 2e8


@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
def test_a_token_that_is_broken_stays_so_alone(ops: Any) -> None:
    x, weight, scales, bias = given(5, 64, 16, torch.float32)
    x.scales[2] = float("nan")
    into = torch.empty(5, 16, device=DEVICE)
    ops.multiply(x, weight, scales, bias, into)
    assert into.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_the_reference_multiplies_what_was_rounded(dtype: torch.dtype) -> None:
    x, weight = noise(20, 64), noise(32, 64, seed=1)
    a, b = (reference.quantise(tensor, dtype) for tensor in (x, weight))
    into = torch.empty(20, 32, device=DEVICE)
    reference.multiply(a, b.values, b.scales, torch.zeros(32, device=DEVICE), into)
    wanted = x @ weight.t()
    error = (into - wanted).norm() / wanted.norm()
    assert 1e-3 < error < (0.05 if dtype == FP8 else 0.015)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [256, 8192])
@pytest.mark.parametrize(("columns", "rows"), [(3072, 9216), (3072, 12288), (12288, 3072)])
def test_products_of_the_full_model(tokens: int, columns: int, rows: int) -> None:
    x, weight, scales, bias = given(tokens, columns, rows, torch.bfloat16)
    found, expected = (torch.empty(tokens, rows, dtype=torch.bfloat16, device=DEVICE) for _ in "ab")
    fused.multiply(x, weight, scales, bias, found)
    reference.multiply(x, weight, scales, bias, expected)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    assert (found != expected).float().mean() < 0.01
