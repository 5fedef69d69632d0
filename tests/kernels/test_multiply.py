"""Products in FP8 and int8: the kernels', and torch's, are the exact ones, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, int8, products, reference
from image_worker.kernels.reference import FP8, LARGEST, Quantised, streams
from tests.kernels.test_fused import DEVICE, TOLERANCE, noise

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
# A card's tensor cores keep about 14 bits of a running FP8 sum.
OF_THE_SUM = {FP8: 2**-9 if DEVICE == "cuda" else 1e-6, torch.int8: 1e-6}

# Tokens of prompts and of pictures, columns, rows: of one tile and several, whole and not.
SHAPES = [
    (0, 1, 16, 8),
    (7, 6, 128, 96),
    (128, 128, 128, 256),
    (130, 5, 208, 264),
    (1, 300, 512, 136),
    (300, 140, 48, 520),
]


def by_int8(x: Quantised, text_tokens: int, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """In the midst of a tensor, around which nothing may be written."""
    room = x.values.new_full((len(x.values) + 2, len(weight) // 2 + 8), 7, dtype=x.dtype)
    into = room[1:-1, :-8]
    for tokens, rows in streams(text_tokens, weight):
        int8.multiply(x[tokens], weight[rows], scales[rows], bias[rows], into[tokens])
    assert (room[0] == 7).all() and (room[-1] == 7).all() and (room[:, -8:] == 7).all()
    return into


Way = Callable[[Quantised, int, Tensor, Tensor, Tensor], Tensor]
not_hopper = pytest.mark.skipif(DEVICE == "cuda" and not HOPPER, reason="a kernel for Hopper")
WAYS = [
    pytest.param(products.multiply, FP8, id="hopper-fp8", marks=not_hopper),
    pytest.param(products.multiply, torch.int8, id="hopper-int8", marks=not_hopper),
    pytest.param(by_int8, torch.int8, id="int8"),
    pytest.param(reference.multiply, FP8, id="reference-fp8"),
    pytest.param(reference.multiply, torch.int8, id="reference-int8"),
]


def given(
    tokens: int, columns: int, rows: int, round_to: torch.dtype, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Activations; weights of both streams, their scales, biases; the largest values among them."""
    x = reference.quantise(noise(tokens, columns, dtype=dtype), round_to)
    weight = reference.quantise(noise(2 * rows, columns, seed=1), round_to)
    return x, weight.values, weight.scales, noise(2 * rows, dtype=dtype, seed=2)


def exact(
    x: Quantised, text_tokens: int, weight: Tensor, scales: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Without bias and with it, in float64."""
    wide = weight.double() * scales
    found = torch.empty(len(x.values), len(weight) // 2, dtype=torch.float64, device=DEVICE)
    for tokens, rows in streams(text_tokens, weight):
        found[tokens] = (x.values[tokens].double() * x.scales[tokens]) @ wide[rows].t()
    with_bias = found.clone()
    for tokens, rows in streams(text_tokens, weight):
        with_bias[tokens] += bias[rows]
    return found, with_bias


@pytest.mark.parametrize(("way", "round_to"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multiply(
    shape: tuple[int, int, int, int], dtype: torch.dtype, way: Way, round_to: torch.dtype
) -> None:
    text, image, columns, rows = shape
    x, weight, scales, bias = given(text + image, columns, rows, round_to, dtype)
    found = way(x, text, weight, scales, bias)
    sums, expected = exact(x, text, weight, scales, bias)
    allowed = TOLERANCE[dtype] * expected.abs() + OF_THE_SUM[round_to] * sums.abs().max() + 1e-5
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("way", "round_to"), [way for way in WAYS if "int8" in str(way.id)])
def test_sums_do_not_overflow_and_are_exact(way: Way, round_to: torch.dtype) -> None:
    columns = 12288  # of the full model's widest product
    one = torch.ones(1, 1, device=DEVICE)
    values = torch.full((1, columns), 127, dtype=torch.int8, device=DEVICE)
    values[0, 0] = 126  # a float32 has no bits left for it
    weight = torch.full((16, columns), -127, dtype=torch.int8, device=DEVICE)
    bias = torch.full((16,), float(127 * 127 * columns), device=DEVICE)
    x = Quantised(values, one, torch.float32)
    found = way(x, 0, weight, torch.ones(16, 1, device=DEVICE), bias)
    assert ((found - 127).abs() <= 16).all()  # half a step of float32 at 2e8


@pytest.mark.parametrize(("way", "round_to"), WAYS)
def test_a_token_that_is_broken_stays_so_alone(way: Way, round_to: torch.dtype) -> None:
    x, weight, scales, bias = given(5, 64, 16, round_to, torch.float32)
    x.scales[2] = float("nan")
    found = way(x, 3, weight, scales, bias)
    assert found.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
def test_the_reference_multiplies_what_was_rounded(round_to: torch.dtype) -> None:
    x, weight = noise(20, 64), noise(64, 64, seed=1)
    a, b = (reference.quantise(tensor, round_to) for tensor in (x, weight))
    found = reference.multiply(a, 8, b.values, b.scales, torch.zeros(64, device=DEVICE))
    wanted = torch.cat([x[:8] @ weight[32:].t(), x[8:] @ weight[:32].t()])
    error = (found - wanted).norm() / wanted.norm()
    assert 1e-3 < error < (0.05 if round_to == FP8 else 0.015)


@pytest.mark.gpu
@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("text", [0, 77, 256])
@pytest.mark.parametrize(
    ("columns", "rows"), [(3072, 9216), (3072, 12288), (12288, 3072), (3072, 128)]
)
def test_products_of_the_full_model(
    columns: int, rows: int, text: int, round_to: torch.dtype
) -> None:
    x, weight, scales, bias = given(4096 + text, columns, rows, round_to, torch.bfloat16)
    found = fused.multiply(x, text, weight, scales, bias)
    expected = reference.multiply(x, text, weight, scales, bias)
    if round_to == torch.int8:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
        assert (found != expected).float().mean() < 0.01
    else:
        assert (found - expected).float().norm() <= 2**-8 * expected.float().norm()


def test_the_largest_value_is_among_those_given() -> None:
    for round_to in (FP8, torch.int8):
        x, weight, _, _ = given(3, 64, 16, round_to, torch.float32)
        assert x.values.float().abs().max() == LARGEST[round_to]
        assert weight.float().abs().max() == LARGEST[round_to]
