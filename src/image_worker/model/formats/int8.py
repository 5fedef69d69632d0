"""int8: one float32 scale per row, activations quantised per token, outliers kept in 16 bit.

Stored and multiplied by bitsandbytes (Dettmers et al., 2022, LLM.int8()); with COMPUTE=int8 only
stored, and the transformer's activations are rounded whole.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

OUTLIER_THRESHOLD = 6.0  # LLM.int8(), section 3.2


def encode(weight: Tensor, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """A `Linear8bitLt` that holds `weight` (out, in), quantised on the device it is on."""
    from bitsandbytes.functional import int8_vectorwise_quant

    values, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return _layer(values, scales, bias)


def empty(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """The same layer, its tensors on the meta device."""
    values = torch.empty(rows, columns, dtype=torch.int8, device="meta")
    return _layer(values, torch.empty(rows, dtype=torch.float32, device="meta"), bias)


def _layer(values: Tensor, scales: Tensor, bias: bool) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    # It warns at every product of the cast to float16; an overflow is caught where it shows.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    rows, columns = values.shape
    layer = Linear8bitLt(
        columns,
        rows,
        bias=bias,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device="meta",
    )
    layer.weight = Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    layer.init_8bit_state()
    return layer  # type: ignore[no-any-return]


def size(rows: int, columns: int) -> int:
    """Bytes: one a value and four a row."""
    return rows * columns + 4 * rows
