"""On a card: kernels decode layers of the full model's size as the definition does."""

from __future__ import annotations

import pytest
import torch

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, LARGEST
from tests.kernels.test_gguf import HALF, HALF_STEP, QUANTISED, SMALLEST, random_blocks, weight_of

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 12288, 3072


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTISED)
def test_decoding_is_exact(name: str, dtype: torch.dtype) -> None:
    weight = weight_of(random_blocks(name, ROWS, COLUMNS), name)
    found, exact = (torch.empty(ROWS, COLUMNS, dtype=dtype, device="cuda") for _ in range(2))
    fused.decode_gguf(weight, found)
    reference.decode_gguf(weight, exact)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("name", QUANTISED)
def test_decoding_to_few_bits(name: str, round_to: torch.dtype) -> None:
    if round_to == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no FP8")
    weight = weight_of(random_blocks(name, ROWS, COLUMNS), name)
    row_scales = weight.largest() / LARGEST[round_to]
    found = torch.empty(ROWS, COLUMNS, dtype=round_to, device="cuda")
    fused.decode_gguf(weight, found, row_scales)
    exact = torch.empty(ROWS, COLUMNS, device="cuda")
    reference.decode_gguf(weight, exact)
    exact /= row_scales
    half = HALF_STEP * exact.abs() + SMALLEST if round_to == FP8 else HALF
    assert ((found.float() - exact).abs() <= half).all()
    assert found.float().abs().amax(dim=1).eq(LARGEST[round_to]).all()
