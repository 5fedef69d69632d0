"""Tensors as nunchaku's packer lays them out: each number is put where a formula says.

The formulas are those of the tensor cores' fragments, lane by lane; what reads such files
(`model/formats/fragments.py`) moves whole axes, so that neither repeats the other's mistakes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a file with weights and activations in int4.
QUANTISATION = {
    "method": "svdquant",
    "weight": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
    "activation": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
}
# Layers that are one in a file, one below the other.
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def up_to(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def filled(tensor: Tensor, *sizes: int, value: float = 0) -> Tensor:
    """In the first corner of a tensor of these sizes."""
    found = torch.full(sizes, value, dtype=tensor.dtype, device=tensor.device)
    found[tuple(slice(size) for size in tensor.shape)] = tensor
    return found


def places(like: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the row, and of the column, of each place of a matrix."""
    rows, columns = (torch.arange(size, device=like.device) for size in like.shape)
    return rows[:, None], columns[None, :]


def put(tensor: Tensor, at: Tensor) -> Tensor:
    """Each number at its place in a row of them all."""
    found = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    found[at.flatten()] = tensor.flatten()
    return found


def pack_codes(codes: Tensor) -> Tensor:
    """int8 (rows, columns / 2), padded, from numbers of -8 to 7, (rows, columns)."""
    codes = filled(codes, up_to(codes.shape[0], 128), up_to(codes.shape[1], 128)).to(torch.uint8)
    n, k = places(codes)
    tile = (n // 128 * (codes.shape[1] // 64) + k // 64) * 8 + n % 128 // 16
    lane = n % 8 * 4 + k % 32 // 8
    word = (tile * 32 + lane) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    nibbles = put(codes & 15, word * 8 + k % 8).view(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int8).view(len(codes), -1)


def pack_scales(scales: Tensor) -> Tensor:
    """(groups, rows), padded, from (rows, groups)."""
    groups = scales.shape[1]
    scales = filled(scales, up_to(len(scales), 128), groups, value=1)
    n, g = places(scales)
    lane = n % 128 // 16 * 4 + n % 8 // 2
    at = (n // 128 * groups + g) * 128 + lane * 4 + n % 16 // 8 * 2 + n % 2
    return put(scales, at).view(groups, -1)


def pack_group_scales(scales: Tensor) -> Tensor:
    """As `pack_scales`, with an even number of groups, or of one group a number for each row."""
    rows, groups = scales.shape
    if groups == 1:
        return pack_vector(scales[:, 0], 1)
    return pack_scales(filled(scales, rows, up_to(groups, 2), value=1))


def pack_vector(vector: Tensor, value: float = 0) -> Tensor:
    padded = filled(vector, up_to(len(vector), 128), value=value)
    return pack_scales(padded[:, None])[0]


def pack_factor(factor: Tensor, *, down: bool) -> Tensor:
    """(channels, rank), padded, from (rank, channels) of the one that reads, or from the other."""
    height, width = (128, 16) if not down else (16, 128)
    factor = filled(factor, up_to(factor.shape[0], height), up_to(factor.shape[1], width))
    n, k = places(factor)
    channel, rank = (k, n) if down else (n, k)
    ranks = factor.shape[0 if down else 1]
    lane = n % 8 * 4 + k % 8 // 2
    tile = channel // 16 * (ranks // 16) + rank // 16
    at = (tile * 32 + lane) * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2
    return put(factor, at).view(-1, ranks)


def pack_awq(codes: Tensor) -> Tensor:
    """int32 (rows / 4, columns / 2) from numbers of 0 to 15, (rows, columns)."""
    n, k = places(codes)
    word = ((n // 4 * (codes.shape[1] // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    nibbles = put(codes.to(torch.uint8), word * 4 + k % 32 // 8).view(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int32).view(len(codes) // 4, -1)
