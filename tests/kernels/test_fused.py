"""Each fused kernel computes what its reference computes in float32, and rounds that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, Quantised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, WIDTH = 13, 192  # a program each; not a power of two, as the model's 3072 is not
# One rounding; the interpreter truncates to bf16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
FP8_STEP = 2**-3  # between neighbours, relative to the smaller
ROUNDINGS = [None, FP8, torch.int8]


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
            assert one.dtype == dtype
            assert_same_rounded(one, other)
            continue
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=TOLERANCE[dtype], atol=1e-6)


def assert_same_rounded(found: Quantised, expected: Quantised) -> None:
    """Where a value lies between two, either may be found: scales differ by their rounding."""
    assert found.values.dtype == expected.values.dtype
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-2, atol=0)
    values, others = with_carries(found.values, expected.values), expected.values.float()
    is_fp8 = found.values.dtype == FP8
    step = FP8_STEP * others.abs() + 2**-9 if is_fp8 else torch.ones_like(others)
    assert ((values - others).abs() <= step).all()
    assert (values != others).float().mean() < 0.05


@pytest.mark.parametrize("round_to", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate(dtype: torch.dtype, round_to: torch.dtype | None) -> None:
    _, shift, scale, owner = modulations(dtype)
    assert_same(
        "modulate", noise(TOKENS, WIDTH, dtype=dtype), shift, scale, owner, round_to=round_to
    )


@pytest.mark.parametrize("round_to", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_modulate(dtype: torch.dtype, round_to: torch.dtype | None) -> None:
    x, y = (noise(TOKENS, WIDTH, dtype=dtype, seed=seed) for seed in (2, 3))
    gate, shift, scale, owner = modulations(dtype)
    residual, found = fused.add_and_modulate(x, y, gate, shift, scale, owner, round_to=round_to)
    assert torch.equal(residual, fused.add(x, y, gate, owner))
    expected = fused.modulate(residual, shift, scale, owner, round_to=round_to)
    if round_to:
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


@pytest.mark.parametrize("round_to", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype: torch.dtype, round_to: torch.dtype | None) -> None:
    assert_same("gelu", 3 * noise(TOKENS, WIDTH, dtype=dtype), round_to=round_to)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_fp8_gives_the_bits_of_its_definition(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = codes.repeat(3, 9).to(DEVICE).view(FP8)  # beyond a program's block, its last not whole
    scales = torch.tensor([[1.0], [3e-3], [0.7]], device=DEVICE)
    found, expected = (torch.empty(values.shape, dtype=dtype, device=DEVICE) for _ in range(2))
    fused.decode_fp8(values, scales, found)
    reference.decode_fp8(values, scales, expected)
    # Triton's interpreter cuts bits of bf16 off, where its compiler rounds.
    cut = 2**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0
    torch.testing.assert_close(found, expected, rtol=cut, atol=0, equal_nan=True)
    exact = values.float() * scales
    torch.testing.assert_close(expected, exact.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 3 * 9 * 2


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise(dtype: torch.dtype, round_to: torch.dtype) -> None:
    x = noise(TOKENS, WIDTH, dtype=dtype)
    x[3] = 0
    x[5, 7] = 1000  # an outlier costs its own token's precision only
    assert_same("quantise", x, round_to)
    found = fused.quantise(x, round_to)
    assert found.scales[5] > 10 * found.scales[4] and found.scales[3] > 0


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -127.0]], device=DEVICE)
    for ops in (fused, reference):
        assert ops.quantise(x, torch.int8).values.tolist() == [[127, 0, 2, 2, 0, -2, -126, -127]]


@pytest.mark.parametrize(
    ("ops", "round_to"),
    [(fused, torch.int8), (reference, torch.int8), (reference, FP8)]
    + [(fused, FP8)] * (DEVICE == "cuda"),  # Triton's interpreter has no NaN in FP8
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_number_is_not_lost(broken: float, ops: Any, round_to: torch.dtype) -> None:
    x = noise(TOKENS, WIDTH)
    x[3, 5] = broken
    mods = torch.zeros(1, WIDTH, device=DEVICE)
    owner = torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE)
    for found in (
        ops.quantise(x, round_to),
        ops.gelu(x, round_to=round_to),
        ops.modulate(x, mods, mods, owner, round_to=round_to),
    ):
        is_finite = (found.values.float() * found.scales).isfinite()
        assert not is_finite[3].all()
        assert is_finite[:3].all() and is_finite[4:].all()


@pytest.mark.parametrize("count", [TOKENS, TOKENS // 2])
@pytest.mark.parametrize("round_to", ROUNDINGS)
def test_to_stream(round_to: torch.dtype | None, count: int) -> None:
    x = noise(TOKENS, WIDTH, dtype=torch.bfloat16)
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[:count].to(DEVICE)
    assert_same("to_stream", x, places, round_to=round_to)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_joint_heads(dtype: torch.dtype) -> None:
    heads, size, text_tokens = 3, 32, 5
    qkv = noise(TOKENS, 3 * heads * size, dtype=dtype)
    norms = noise(2, 2, size, dtype=dtype, seed=1)
    angles = noise(TOKENS, size // 2, seed=2)
    rope = torch.polar(torch.ones_like(angles), angles)
    places = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_same("to_joint_heads", qkv, norms, rope, places, text_tokens)
