"""NF4: 4-bit values on a normal-quantile grid, in blocks of 64 with one scale each.

The scales are quantised themselves, to 8 bits in blocks of 256 ("double quantisation"): 0.9 GiB
less for the transformer. Stored and multiplied by bitsandbytes (Dettmers et al., 2023, QLoRA).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 64
SCALE_BLOCK = 256


def encode(weight: Tensor, bias: bool, dtype: torch.dtype) -> nn.Module:
    """A `Linear4bit` that holds `weight` (out, in), quantised on the device it is on."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = weight.shape
    layer = Linear4bit(
        columns,
        rows,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # `.to` quantises a Params4bit that is not quantised yet.
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(weight.device)
    layer.weight.module = None  # or the two keep each other alive when nobody needs them any more
    return layer  # type: ignore[no-any-return]


def size(rows: int, columns: int) -> int:
    """Bytes: half a byte a value, one a block, four a block of blocks."""
    values = rows * columns
    blocks = -(-values // BLOCK)
    return values // 2 + blocks + 4 * -(-blocks // SCALE_BLOCK)
