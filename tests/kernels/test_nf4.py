"""NF4 weights decoded are bitsandbytes' values: the very same, or rounded to FP8 or int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, LARGEST, round_values
from image_worker.model.formats import nf4
from image_worker.model.formats.nf4 import Nf4Weight, encode
from image_worker.model.linear import Decoded, Scratch
from tests.kernels.test_fused import with_carries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]

# Small, since Triton's interpreter is slow; each is what none of the others is. The first has over
# 256 blocks of 64, which share a scale of scales; the second, blocks for more than one tile.
SHAPES = [(20, 1024), (10, 1088), (12, 64)]


@pytest.fixture(params=[fused, reference], ids=["fused", "reference"])
def ops(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What decodes and multiplies, in turn."""
    monkeypatch.setattr(nf4, "operations", lambda device: request.param)
    return request.param


def layers(count: int, shape: tuple[int, int], bias: Tensor | None = None) -> list[Any]:
    """Ours. The first one's weights are 0."""
    made = []
    for weight in weights(count, shape):
        layer: Any = encode(weight, True, torch.bfloat16)
        layer.bias = nn.Parameter(torch.zeros(shape[0], device=DEVICE) if bias is None else bias)
        made.append(layer)
    return made


def weights(count: int, shape: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [number * torch.randn(shape, generator=generator) for number in range(count)]
    return [weight.bfloat16().to(DEVICE) for weight in made]


def expected(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes makes of a weight: quantised, and decoded to `dtype`."""
    codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    return dequantize_4bit(codes, state)  # type: ignore[no-any-return]


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3])
def test_decoding_to_few_bits(
    count: int, shape: tuple[int, int], round_to: torch.dtype, ops: Any
) -> None:
    product = Decoded(layers(count, shape), Scratch(DEVICE, round_to), ops, round_to)
    found = torch.empty(product.shape, dtype=round_to, device=DEVICE)
    product.decode(found)
    values = torch.cat([expected(weight, torch.float32) for weight in weights(count, shape)])
    rounded = round_values(values / product.row_scales, round_to)
    assert (with_carries(found, rounded) == rounded.float()).float().mean() > 0.999
    assert (found[: shape[0]].float() == 0).all()
    largest = with_carries(found, rounded)[shape[0] :].abs().amax(dim=1)
    assert largest.eq(LARGEST[round_to]).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("count", "shape"), [(1, (96, 192)), (2, (40, 320)), (3, (2, 64)), (2, (1100, 64))]
)
def test_decoding_is_exact(
    count: int, shape: tuple[int, int], dtype: torch.dtype, ops: Any
) -> None:
    weight = Nf4Weight.stacked([layer.weight for layer in layers(count + 1, shape)[1:]])
    found = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
    ops.decode_nf4(weight, found)
    values = [expected(one, dtype) for one in weights(count + 1, shape)[1:]]
    if ops is fused and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        # Triton's interpreter cuts bits off, where its compiler rounds.
        wide = [expected(one, torch.float32) for one in weights(count + 1, shape)[1:]]
        values = [(one.view(torch.int32) & -(2**16)).view(torch.float32) for one in wide]
    assert torch.equal(found.float(), torch.cat(values).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("ops")
def test_a_layer(dtype: torch.dtype) -> None:
    layer = layers(2, (96, 192), torch.linspace(-1, 1, 96, device=DEVICE).to(dtype))[1]
    x = torch.randn(2, 5, 192, device=DEVICE).to(dtype)
    values = expected(weights(2, (96, 192))[1], dtype)
    assert torch.equal(layer(x), functional.linear(x, values, layer.bias))


@pytest.mark.parametrize("text_tokens", [0, 3])
def test_products_of_both_streams_in_their_own_type(text_tokens: int, ops: Any) -> None:
    made = layers(4, (96, 192), torch.linspace(-1, 1, 96, device=DEVICE))
    product = Decoded(made, Scratch(DEVICE, torch.float32), ops, None)
    assert product.round_to is None
    x = torch.randn(8, 192, device=DEVICE)
    found = product(x, text_tokens)
    values = [expected(weight, torch.float32) for weight in weights(4, (96, 192))]
    for part, pair in (
        (slice(text_tokens), values[2:]),
        (slice(text_tokens, None), values[:2]),
    ):
        sides = [functional.linear(x[part], value, made[0].bias) for value in pair]
        torch.testing.assert_close(found[part], torch.cat(sides, dim=1), rtol=1e-5, atol=1e-5)
