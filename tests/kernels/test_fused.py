"""Each fused kernel computes what its reference computes in float32, and rounds that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import Quantised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, WIDTH = 37, 192  # not a power of two, as the model's 3072 is not
# One rounding; the interpreter truncates to bf16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
FP8_STEP = 2**-3  # between neighbours, relative to the smaller


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def modulations(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, shift and scale, as views of one tensor, and whose they are."""
    mods = noise(3, 4, 6, WIDTH, dtype=dtype, seed=1)
    owner = torch.arange(TOKENS, device=DEVICE) * 7 % 3
    return mods[:, 1, 2], mods[:, 2, 0], mods[:, 2, 1], owner


def with_carries(found: Tensor, expected: Tensor) -> Tensor:
    """found as float32. Triton's interpreter, not its compiler, halves what rounds up to a power
    of two: where that is so, it is doubled."""
    wide = found.float()
    if DEVICE == "cuda":
        return wide
    is_power = torch.frexp(expected.float()).mantissa.abs() == 0.5
    return torch.where(is_power & (2 * wide == expected.float()), 2 * wide, wide)


def wide(given: Any) -> Any:
    is_wide = not isinstance(given, Tensor) or not given.is_floating_point()
    return given if is_wide else given.float()


def assert_same(operation: str, *given: Any, **options: Any) -> None:
    """The kernel's results against the reference's on the same values in float32."""
    found = getattr(fused, operation)(*given, **options)
    expected = getattr(reference, operation)(*map(wide, given), **options)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    dtype = next(value.dtype for value in given if isinstance(value, Tensor))
    for one, other in pairs:
        if isinstance(other, Quantised):
            assert_same_fp8(one, other)
            continue
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=TOLERANCE[dtype], atol=1e-6)


def assert_same_fp8(found: Quantised, expected: Quantised) -> None:
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-2, atol=0)
    values, others = with_carries(found.values, expected.values), expected.values.float()
    assert ((values - others).abs() <= FP8_STEP * others.abs() + 2**-9).all()
    assert (values != others).float().mean() < 0.05


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate(dtype: torch.dtype, fp8: bool) -> None:
    _, shift, scale, owner = modulations(dtype)
    assert_same("modulate", noise(TOKENS, WIDTH, dtype=dtype), shift, scale, owner, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_modulate(dtype: torch.dtype, fp8: bool) -> None:
    x, y = (noise(TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in (2, 3))
    gate, shift, scale, owner = modulations(dtype)
    residual, found = fused.add_and_modulate(x, y, gate, shift, scale, owner, fp8=fp8)
    assert torch.equal(residual, fused.add(x, y, gate, owner))
    expected = fused.modulate(residual, shift, scale, owner, fp8=fp8)
    if fp8:
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.values.float(), expected.values.float())
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype: torch.dtype) -> None:
    x, y = (noise(TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in (2, 3))
    gate, _, _, owner = modulations(dtype)
    assert_same("add", x, y, gate, owner)


def test_add_stays_finite_in_half_precision() -> None:
    x = torch.full((2, 8), 60000.0, dtype=torch.float16, device=DEVICE)
    one = torch.ones(1, 8, dtype=torch.float16, device=DEVICE)
    owner = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for ops in (fused, reference):
        assert (ops.add(x, x, one, owner) == 65504).all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype: torch.dtype, fp8: bool) -> None:
    assert_same("gelu", 3 * noise(TOKENS, WIDTH, dtype=dtype), fp8=fp8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise(dtype: torch.dtype) -> None:
    x = noise(TOKENS, WIDTH, dtype=dtype)
    x[3] = 0
    x[5, 7] = 1000  # an outlier costs its own token's precision only
    assert_same("quantise", x)
    found = fused.quantise(x)
    assert found.scales[5] > 10 * found.scales[4] and found.scales[3] > 0


@pytest.mark.parametrize("fp8", [False, True])
def test_to_stream(fp8: bool) -> None:
    x = noise(TOKENS, WIDTH, dtype=torch.bfloat16)
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same("to_stream", x, places, fp8=fp8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_joint_heads(dtype: torch.dtype) -> None:
    heads, size, text_tokens = 3, 32, 11
    qkv = noise(TOKENS, 3 * heads * size, dtype=dtype)
    norms = noise(2, 2, size, dtype=dtype, seed=1)
    angles = noise(TOKENS, size // 2, seed=2)
    rope = torch.polar(torch.ones_like(angles), angles)
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same("to_joint_heads", qkv, norms, rope, places, text_tokens)
