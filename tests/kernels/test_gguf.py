"""Weights in ggml's blocks decoded are its Python package's values: the very same, or rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from image_worker.kernels import fused, gguf_blocks, reference
from image_worker.kernels.reference import FP8, LARGEST, LEAST_AMAX, round_values
from image_worker.model.formats import gguf
from image_worker.model.formats.gguf import GgufWeight
from tests.kernels.test_fused import with_carries
from tools.ggml import block_of, quantise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUANTISED = [name for name in gguf_blocks.TYPES if name not in gguf_blocks.NUMBERS]
# Of normally distributed numbers, relative.
ERRORS = {
    "Q8_0": 0.006,
    "Q6_K": 0.021,
    "Q5_0": 0.046,
    "Q5_1": 0.041,
    "Q5_K": 0.041,
    "Q4_0": 0.092,
    "Q4_1": 0.084,
    "Q4_K": 0.084,
    "Q3_K": 0.22,
    "Q2_K": 0.36,
}
# Small for Triton's interpreter, which is slow; more than one program, the last not whole.
ROWS = 9
HALF = 0.5001
HALF_STEP, SMALLEST = HALF * 2**-3, 2**-9  # of FP8: relative to a number; above 0


@pytest.fixture(params=[fused, reference], ids=["fused", "reference"])
def ops(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What decodes, in turn."""
    monkeypatch.setattr(gguf, "operations", lambda device: request.param)
    return request.param


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, bytes) of any bits, but for numbers in half precision, which are finite; float32 is of
    normally distributed numbers."""
    values, size = block_of(name)
    generator = np.random.default_rng(seed)
    if name == "F32":
        return generator.standard_normal((rows, columns)).astype(np.float32).view(np.uint8)
    found = generator.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    for at in gguf_blocks.HALVES[name]:
        exponents = found[:, at + 1]
        found[:, at + 1] = np.where(exponents & 0x7C == 0x7C, exponents ^ 0x40, exponents)
    return found.reshape(rows, -1)


def weight_of(data: np.ndarray, name: str) -> GgufWeight:
    return GgufWeight(torch.from_numpy(data).to(DEVICE), name, block_of(name))


def expected(data: np.ndarray, name: str) -> Tensor:
    """By the package."""
    found = np.array(dequantize(data, GGMLQuantizationType[name]))
    return torch.from_numpy(found).to(DEVICE)


def bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int32)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_definition_has_the_packages_bits(name: str) -> None:
    columns = 5 * block_of(name)[0]
    data = random_blocks(name, 1000, columns)
    found = torch.empty(1000, columns, device=DEVICE)
    reference.decode_gguf(weight_of(data, name), found)
    assert torch.equal(bits(found), bits(expected(data, name)))


@pytest.mark.parametrize(("name", "most"), ERRORS.items())
def test_what_was_quantised_is_near(name: str, most: float) -> None:
    """Which random bits cannot show: that values come in the right order."""
    numbers = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    found = torch.empty(16, 256, device=DEVICE)
    reference.decode_gguf(weight_of(quantise(numbers, name), name), found)
    exact = torch.from_numpy(numbers).to(DEVICE)
    assert 0.8 * most < (found - exact).norm() / exact.norm() <= most


@pytest.mark.parametrize("name", QUANTISED)
def test_kernels_have_the_definitions_bits(name: str) -> None:
    data = random_blocks(name, ROWS, 256)
    found = torch.empty(ROWS, 256, device=DEVICE)
    fused.decode_gguf(weight_of(data, name), found)
    assert torch.equal(bits(found), bits(expected(data, name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q5_1", "Q4_K"])
def test_rounding_to_wide_types(name: str, dtype: torch.dtype, ops: Any) -> None:
    weight = weight_of(random_blocks(name, ROWS, 256), name)
    wide, found = (torch.empty(ROWS, 256, dtype=kind, device=DEVICE) for kind in (None, dtype))
    weight.decode(wide)
    weight.decode(found)
    if ops is fused and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        # Triton's interpreter cuts bits off, where its compiler rounds.
        assert torch.equal(bits(found.float()), bits(wide) & -(2**16))
    else:
        assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q5_0", "Q3_K", "Q5_K"])
def test_rounding_to_few_bits(name: str, round_to: torch.dtype, ops: Any) -> None:
    if name in gguf_blocks.NUMBERS:
        numbers = torch.randn(ROWS, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
        data = numbers.view(torch.uint8).numpy()
    else:
        data = random_blocks(name, ROWS, 512)
    weight = weight_of(data, name)
    row_scales = weight.largest().clamp(min=LEAST_AMAX) / LARGEST[round_to]
    found = torch.empty(ROWS, 512, dtype=round_to, device=DEVICE)
    weight.decode(found, row_scales)
    exact = expected(data, name) / row_scales
    values = round_values(exact, round_to)
    numbers = with_carries(found, values)
    if ops is fused:  # which divides in fewer instructions; Triton's interpreter rounds halves up
        half = HALF_STEP * exact.abs() + SMALLEST if round_to == FP8 else HALF
        assert ((numbers - exact).abs() <= half).all()
    else:
        assert torch.equal(numbers, values.float())
    assert numbers.abs().amax(dim=1).eq(LARGEST[round_to]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
@pytest.mark.usefixtures("ops")
def test_stacked_weights_and_their_largest_values(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf, "_PIECE", 512)  # several pieces
    parts = [random_blocks(name, 3, 256, seed) for seed in range(2)]
    weight = GgufWeight.stacked([weight_of(data, name) for data in parts])
    values = torch.cat([expected(data, name) for data in parts])
    assert weight.shape == (6, 256) and weight.kind == weight_of(parts[0], name).kind
    assert torch.equal(weight.largest(), values.abs().amax(dim=1, keepdim=True))
    found = torch.empty(weight.shape, device=DEVICE)
    weight.decode(found)
    assert torch.equal(found, values)


def test_numbers_that_are_not_finite_are_found() -> None:
    for name in QUANTISED:
        data = random_blocks(name, 4, 256)
        assert weight_of(data, name).is_finite()
        for at in gguf_blocks.HALVES[name]:
            damaged = data.copy().reshape(-1, block_of(name)[1])
            damaged[-1, at : at + 2] = 0x00, 0xFC  # -∞
            assert not weight_of(damaged.reshape(4, -1), name).is_finite()


def test_kinds_differ_by_type() -> None:
    four, five = (weight_of(random_blocks(name, 1, 256), name) for name in ("Q4_0", "Q5_0"))
    assert four.kind != five.kind
