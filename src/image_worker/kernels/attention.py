"""Attention with queries and keys in int8, and softmax's weights and values in FP8, for Hopper.

What attention reads lies in tiles of 128 tokens of one head, 16 KiB each, as the tensor cores read
their shared memory, so that a tile is one contiguous copy:

- heads are padded to 128 channels;
- a row is 128 bytes: a query's or key's channels, or a channel's values for 128 tokens;
- in row r, piece c of 16 bytes stands at place c XOR (r mod 8);
- of each 16 keys, key k stands in row 8 (k / 2 mod 2) + 2 (k / 4) + k mod 2: the product of queries
  and keys then leaves each thread with the weights of four keys in a row, as the next product
  wants them.

Each row of a batch begins a new tile. "Places" are tokens counted so, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from image_worker.kernels.attention_reference import LEAST_VALUE, TASK, TILE
from image_worker.kernels.cuda import Kernel
from image_worker.kernels.reference import EPSILON, FP8_MAX, INT8_MAX, LEAST_AMAX

_GROUPS = TASK // 64  # warpgroups that compute; one more copies
# Of tiles_sm90.cu. Of 1, 2, 3 and 6 heads 2 took least at 8,448 tokens as at 2,304; with 16 warps a
# thread has so few values that two blocks of threads share a multiprocessor.
_HEADS_EACH, _WARPS, _PIECE = 2, 16, 8
_STAGES, _SIZE = 4, 128
# Queries, tiles of keys and of values with eight rows of ones, barriers; and to align them.
_SHARED_BYTES = _SIZE * (TASK + _STAGES * (2 * TILE + 8)) + 8 * (2 + 4 * _STAGES) + 1024
ATTENTION_SIZES: dict[str, int | str] = {
    "CHANNELS": _SIZE,
    "KEYS": TILE,
    "GROUPS": _GROUPS,
    "STAGES": _STAGES,
}
TILES_SIZES: dict[str, int | str] = {
    "CHANNELS": _SIZE,
    "KEYS": TILE,
    "HEADS_EACH": _HEADS_EACH,
    "WARPS": _WARPS,
    "PIECE": _PIECE,
    "INT8_MAX": f"{INT8_MAX}f",
    "FP8_MAX": f"{FP8_MAX}f",
    "LEAST_AMAX": f"{LEAST_AMAX}f",
    "LEAST_VALUE": f"{LEAST_VALUE}f",
    "EPSILON": f"{EPSILON}f",
}


@dataclass(frozen=True)
class Tiles:
    """What attention reads, and what its numbers are to be multiplied by.

    queries, keys (int8) and values (FP8), uint8 (heads · places, 128); query_scales (heads ·
    places), with log2(e) / sqrt(D) in them; scales (heads, places / 128, 2): of keys, and the
    logarithm, to the base 2, of that of values; float32. A task's queries begin anywhere: behind
    the last ones and their scales are as many as a task has, which are read and not used.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    query_scales: Tensor
    scales: Tensor


class Attend:
    """The kernels, compiled for the current card."""

    def __init__(self, cache: Path | None = None) -> None:
        """Compiles them, in a second, or finds them in the folder `cache`.

        Raises:
            Exception: they cannot run here. Errors of CUDA's packages have no kind of their own.
        """
        self._to_tiles = Kernel("tiles_sm90.cu", "to_tiles", TILES_SIZES, cache)
        self._attend = Kernel(
            "attention_sm90.cu", "attend", ATTENTION_SIZES, cache, shared_bytes=_SHARED_BYTES
        )
        self._blocks = torch.cuda.get_device_properties().multi_processor_count

    def to_tiles(
        self, qkv: Tensor, norms: Tensor, rope: Tensor, owners: Tensor, text_tokens: int
    ) -> Tiles:
        """Queries and keys normalised by RMS and rotated, and values: `reference.to_joint_heads`.

        qkv and norms (bfloat16), rope: as there; owners (places) int32: which token is in a place,
        -1 for none.
        """
        places, size = len(owners), norms.shape[-1]
        if size > _SIZE or size % _PIECE:
            raise ValueError(f"heads have {size} channels, which is no multiple of 8 up to 128")
        if qkv.dtype != torch.bfloat16 or norms.dtype != torch.bfloat16:
            raise ValueError(f"attention in int8 reads bfloat16, not {qkv.dtype}, {norms.dtype}")
        heads = qkv.shape[1] // 3 // size
        device = qkv.device
        room = torch.empty(3, heads * places + TASK, _SIZE, dtype=torch.uint8, device=device)
        query_scales = torch.empty(heads * places + TASK, dtype=torch.float32, device=device)
        scales = torch.empty(heads, places // TILE, 2, dtype=torch.float32, device=device)
        tiles = Tiles(room[0], room[1], room[2], query_scales, scales)
        self._to_tiles(
            (-(-heads // _HEADS_EACH), places // TILE),
            32 * _WARPS,
            *(qkv, norms, rope, owners),
            *(tiles.queries, tiles.keys, tiles.values, tiles.query_scales, tiles.scales),
            *(text_tokens, heads, size, 1 / size, math.log2(math.e) / math.sqrt(size)),
        )
        return tiles

    def __call__(
        self, tiles: Tiles, tasks: Tensor, owners: Tensor, tokens: int, size: int
    ) -> Tensor:
        """Each row's tokens by its own only: (tokens, heads · size) bfloat16, where `owners` stand.

        tasks (M, 4) int32: place of the first of 192 queries; of its row's first token, and one
        after its last; and 0.
        """
        heads = len(tiles.scales)
        result = torch.empty(tokens, heads * size, dtype=torch.bfloat16, device=owners.device)
        self._attend(
            (self._blocks,),
            128 * (_GROUPS + 1),
            *(tiles.queries, tiles.keys, tiles.values, tiles.query_scales, tiles.scales),
            *(tasks, owners, result),
            *(len(tasks), heads, len(owners), size),
        )
        return result
