"""What the blocks of ggml's types stand for, in plain torch.

Layouts are those of ggml's `ggml-common.h`, values those of its `dequantize_row_*` functions: each
is computed in float32 in their order of operations, so that results have their bits. Functions take
blocks (N, bytes of a block) uint8, contiguous, and give their values (N, values of a block).

In blocks of 256 ("K-quants") value v is number v % 32 of part v // 32; 16 or 32 neighbours share a
scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # not coded


def values(blocks: Tensor, tensor_type: str) -> Tensor:
    """float32, on the blocks' device."""
    if tensor_type in NUMBERS:
        return blocks.view(NUMBERS[tensor_type]).float()
    return _DECODERS[tensor_type](blocks)


def scales(blocks: Tensor, tensor_type: str) -> list[Tensor]:
    """The half-precision numbers in each block, (N, 1) float16 each: if they are finite, all values
    are."""
    return [_half(blocks, at) for at in HALVES[tensor_type]]


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].view(torch.float16)


def _scale(blocks: Tensor, at: int) -> Tensor:
    return _half(blocks, at).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return _scale(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _scale(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _scale(blocks, 0) * _nibbles(blocks[:, 4:]) + _scale(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) + 16 * _bits(blocks[:, 2:6])
    return _scale(blocks, 0) * (codes - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) + 16 * _bits(blocks[:, 4:8])
    return _scale(blocks, 0) * codes + _scale(blocks, 2)


def _nibbles(packed: Tensor) -> Tensor:
    """(N, 32) float32 of (N, 16): the lower halves, then the higher."""
    return torch.cat([packed & 15, packed >> 4], dim=1).float()


def _bits(packed: Tensor) -> Tensor:
    """(N, 32) float32 of (N, 4), from the lowest on."""
    return (packed[:, :, None] >> _range(packed, 8) & 1).flatten(1).float()


def _q2_k(blocks: Tensor) -> Tensor:
    factors = _scale(blocks, 80) * (blocks[:, :16] & 15).float()
    offsets = _scale(blocks, 82) * (blocks[:, :16] >> 4).float()
    codes = _parts(blocks[:, 16:80], 2, 32).float().view(-1, 16, 16)
    return (factors[:, :, None] * codes - offsets[:, :, None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], dim=1)
    high = _parts(packed[:, 8:], 2, 4).flatten(1)
    factors = _scale(blocks, 108) * ((low | high << 4).float() - 32)
    # 4 is taken away where the bit is not set.
    codes = _parts(blocks[:, 32:96], 2, 32) | _parts(blocks[:, :32], 1, 32) << 2
    return (factors[:, :, None] * (codes.float().view(-1, 16, 16) - 4)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_six_bits(blocks, _parts(blocks[:, 16:], 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    return _of_six_bits(
        blocks, _parts(blocks[:, 48:], 4, 32) | _parts(blocks[:, 16:48], 1, 32) << 4
    )


def _of_six_bits(blocks: Tensor, codes: Tensor) -> Tensor:
    """With scales and offsets of 6 bits each; codes (N, 8, 32).

    Those of the first four parts are in the lower bits of bytes 0 to 3 and 4 to 7. Those of the
    others have their lower four bits in bytes 8 to 11, and their higher two on top of the former.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    offsets = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    wide = (_scale(blocks, 0) * factors.float())[:, :, None] * codes.float()
    return (wide - (_scale(blocks, 2) * offsets.float())[:, :, None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    factors = _scale(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    low = _parts(blocks[:, :128], 4, 64).view(-1, 8, 32)
    codes = low | _parts(blocks[:, 128:192], 2, 32) << 4
    return (factors[:, :, None] * (codes.float().view(-1, 16, 16) - 32)).flatten(1)


def _parts(packed: Tensor, bits: int, run: int) -> Tensor:
    """(N, parts, run) uint8 of (N, bytes): of each run of bytes the lowest bits, then the next."""
    runs = packed.view(len(packed), -1, 1, run)
    shifts = _range(packed, 8 // bits)[:, None] * bits
    return (runs >> shifts & (1 << bits) - 1).flatten(1, 2)


def _range(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
# Where a block has numbers in half precision.
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
TYPES = (*NUMBERS, *_DECODERS)
