"""NF4: 4-bit values on a normal-quantile grid, in blocks of 64 with one scale each.

The scales are quantised themselves, to 8 bits in blocks of 256 ("double quantisation"): 0.9 GiB
less for the transformer. Stored and multiplied by bitsandbytes (Dettmers et al., 2023, QLoRA).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
SCALE_BLOCK = 256


def encode(weight: Tensor, bias: bool, dtype: torch.dtype) -> nn.Module:
    """A `Linear4bit` that holds `weight` (out, in), quantised on the device it is on."""
    from bitsandbytes.nn import Params4bit

    rows, columns = weight.shape
    layer = _layer(rows, columns, bias, dtype)
    # `.to` quantises a Params4bit that is not quantised yet.
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(weight.device)
    layer.weight.module = None  # or the two keep each other alive when nobody needs them any more
    return layer  # type: ignore[no-any-return]


def empty(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    """The same layer, its tensors on the meta device."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def meta(count: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    blocks = -(-rows * columns // BLOCK)
    scales = QuantState(
        absmax=meta(-(-blocks // SCALE_BLOCK), torch.float32),
        code=meta(256, torch.float32),
        blocksize=SCALE_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=meta(blocks, torch.uint8),
        shape=torch.Size((rows, columns)),
        code=meta(16, torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device="meta"),
        state2=scales,
    )
    layer = _layer(rows, columns, bias, dtype)
    layer.weight = Params4bit(
        torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device="meta"),
        quant_state=state,
        blocksize=BLOCK,
        quant_type="nf4",
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer  # type: ignore[no-any-return]


def _layer(rows: int, columns: int, bias: bool, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        columns,
        rows,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # It would pack weights in another way at its first product, and they would be stored like that.
    layer.support_avx512bf16_for_cpu = False
    return layer


def size(rows: int, columns: int) -> int:
    """Bytes: half a byte a value, one a block, four a block of blocks."""
    values = rows * columns
    blocks = -(-values // BLOCK)
    return values // 2 + blocks + 4 * -(-blocks // SCALE_BLOCK)
