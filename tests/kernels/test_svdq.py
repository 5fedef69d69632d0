"""SVDQuant weights decoded are what their parts stand for, in every type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, LARGEST, round_values
from image_worker.model.formats import svdq
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.svdq import SvdqWeight
from image_worker.model.linear import Decoded, Scratch
from tests.kernels.test_fused import TOLERANCE, with_carries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]

# Layers, rows, columns, rank: rows and groups that fill no tile, or more than one; ranks that are
# multiplied in part, and in more than one turn.
SHAPES = [(1, 20, 192, 16), (2, 130, 64, 32), (3, 8, 320, 48), (1, 4, 128, 128)]


@pytest.fixture(params=[fused, reference], ids=["fused", "reference"])
def ops(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What decodes and multiplies, in turn."""
    monkeypatch.setattr(svdq, "operations", lambda device: request.param)
    return request.param


def layer(
    rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> SvdqWeight:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales, inverse = noise(rows, columns // 64).to(dtype), noise(1, columns).exp()
    down, up = (part.to(dtype) for part in (0.3 * noise(1, rank, columns), noise(rows, rank)))
    return SvdqWeight(codes, scales, inverse, down, up).to(DEVICE)


def stacked(layers: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> SvdqWeight:
    return SvdqWeight.stacked([layer(*shape, dtype, seed) for seed in range(layers)])


def expected(weight: SvdqWeight) -> Tensor:
    """By the definition, in float64: (rows, columns)."""
    codes = torch.stack([weight.codes & 15, weight.codes >> 4], dim=-1).flatten(1).double()
    signed = torch.where(codes > 7, codes - 16, codes)
    values = signed * weight.scales.double().repeat_interleave(64, dim=1)
    height = len(codes) // len(weight.inverse)
    values *= weight.inverse.double().repeat_interleave(height, dim=0)
    up = weight.up.double().view(len(weight.inverse), height, -1)
    return values + (up @ weight.down.double()).flatten(0, 1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_rounded_once(
    shape: tuple[int, int, int, int], dtype: torch.dtype, ops: Any
) -> None:
    weight = stacked(*shape)
    found = torch.full(weight.shape, float("nan"), dtype=dtype, device=DEVICE)
    ops.decode_svdq(weight, found)
    torch.testing.assert_close(
        found.double(), expected(weight), rtol=TOLERANCE[dtype], atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_in_other_types(dtype: torch.dtype, ops: Any) -> None:
    weight = stacked(2, 20, 128, 16, dtype=dtype)
    found = torch.empty(weight.shape, device=DEVICE)
    ops.decode_svdq(weight, found)
    torch.testing.assert_close(found.double(), expected(weight), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_decoding_to_few_bits(
    shape: tuple[int, int, int, int], round_to: torch.dtype, ops: Any
) -> None:
    layers = [CodedLinear(layer(*shape[1:], seed=seed)) for seed in range(shape[0])]
    for one in layers:
        one.bias = torch.nn.Parameter(torch.zeros(shape[1], device=DEVICE))
    product = Decoded(layers, Scratch(DEVICE, round_to), ops, round_to)
    assert len(product.weights) == 1
    found = torch.empty(product.shape, dtype=round_to, device=DEVICE)
    product.decode(found)
    values = expected(stacked(*shape)).float()
    rounded = round_values(values / product.row_scales, round_to)
    assert (with_carries(found, rounded) == rounded.float()).float().mean() > 0.999
    largest = with_carries(found, rounded).abs().amax(dim=1)
    assert largest.eq(LARGEST[round_to]).all()


def test_the_largest_of_rows_are_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svdq, "_PIECE", 3)
    weight = stacked(2, 7, 128, 16)
    assert [len(piece) for _, piece in weight.pieces()] == [3, 3, 1, 3, 3, 1]
    largest = expected(weight).abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(weight.largest().double(), largest, rtol=1e-5, atol=1e-5)


def test_only_those_alike_are_stacked() -> None:
    layers = [layer(8, 64, 16), layer(8, 64, 32), layer(8, 64, 32, torch.float16)]
    assert len({weight.kind for weight in layers}) == 3
