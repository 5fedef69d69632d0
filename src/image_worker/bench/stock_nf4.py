"""bitsandbytes' own NF4 layers, of the tensors of ours: to measure and to test against."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.nf4 import BLOCK, SCALE_BLOCK, Nf4Weight


def use_bitsandbytes(module: nn.Module, dtype: torch.dtype) -> None:
    """Its layers of ours become bitsandbytes', which share their tensors and compute in `dtype`."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, CodedLinear) and isinstance(layer.weight, Nf4Weight):
            module.set_submodule(name, linear4bit(layer, dtype))


def linear4bit(layer: CodedLinear, dtype: torch.dtype) -> Any:
    """bitsandbytes' layer of that one's tensors."""
    made = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(
        layer.weight.codes.view(-1, 1),
        quant_state=quant_state(layer.weight, dtype),
        blocksize=BLOCK,
        quant_type="nf4",
        bnb_quantized=True,
    )
    made.bias = layer.bias
    # On some CPUs it would change its weights' order at its first product, and ours with them.
    made.support_avx512bf16_for_cpu = False
    return made


def quant_state(weight: Nf4Weight, dtype: torch.dtype) -> QuantState:
    """What its `dequantize_4bit` needs to know of one layer's weight, to decode it to `dtype`."""
    scales = QuantState(
        absmax=weight.scales_of_scales[0],
        code=weight.levels,
        blocksize=SCALE_BLOCK,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=weight.scales.flatten(),
        shape=torch.Size(weight.shape),
        code=weight.grid,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offsets[0],
        state2=scales,
    )
