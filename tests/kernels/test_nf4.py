"""NF4 weights decoded to FP8 or int8 are bitsandbytes' values, rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, LARGEST, round_values
from image_worker.model.formats.nf4 import encode
from image_worker.model.linear import Nf4, Scratch
from tests.kernels.test_fused import with_carries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Small, since Triton's interpreter is slow; each is what none of the others is. The first has over
# 256 blocks of 64, which share a scale of scales; the second, blocks for more than one tile.
SHAPES = [(20, 1024), (10, 1088), (12, 64)]


@pytest.mark.parametrize("ops", [fused, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("round_to", [FP8, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [2, 3])
def test_decoding(layers: int, shape: tuple[int, int], round_to: torch.dtype, ops: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    modules = []
    for number in range(layers):
        weight = number * torch.randn(shape, generator=generator).bfloat16()  # the first is 0
        module = encode(weight.to(DEVICE), True, torch.bfloat16)
        module.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.bfloat16, device=DEVICE))
        modules.append(module)
    scratch = Scratch(DEVICE)
    product = Nf4(modules, scratch, ops, round_to)
    found = ops.decode_nf4(product, scratch.memory)
    states = [copy.copy(module.weight.quant_state) for module in modules]
    for state in states:
        state.dtype = torch.float32
    values = [
        dequantize_4bit(module.weight.data, state)
        for module, state in zip(modules, states, strict=True)
    ]
    expected = round_values(torch.cat(values) / product.row_scales, round_to)
    assert found.dtype == round_to
    assert (with_carries(found, expected) == expected.float()).float().mean() > 0.999
    assert (found[: shape[0]].float() == 0).all()
    largest = with_carries(found, expected)[shape[0] :].abs().amax(dim=1)
    assert largest.eq(LARGEST[round_to]).all()
