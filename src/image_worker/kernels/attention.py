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

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.reference import EPSILON, LEAST_VALUE, TASK, TILE
from image_worker.kernels.rounding import FP8_MAX, INT8_MAX, LEAST_AMAX, to_int8

_GROUPS = TASK // 64  # warpgroups that compute; one more copies
_STAGES, _SIZE = 4, 128
# Queries, tiles of keys and of values with eight rows of ones, barriers; and to align them.
_SHARED_BYTES = _SIZE * (TASK + _STAGES * (2 * TILE + 8)) + 8 * (2 + 4 * _STAGES) + 1024
_EPSILON = tl.constexpr(EPSILON)
_LEAST_VALUE = tl.constexpr(LEAST_VALUE)


@dataclass(frozen=True)
class Tiles:
    """What attention reads, and what its numbers are to be multiplied by.

    queries, keys (int8) and values (FP8), uint8 (heads · places, 128); query_scales (heads ·
    places), with log2(e) / sqrt(D) in them; scales (heads, places / 128, 2): of keys, and the
    logarithm, to the base 2, of that of values; float32. Queries and their scales have a tile more,
    which is read and not used.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    query_scales: Tensor
    scales: Tensor


def to_tiles(qkv: Tensor, norms: Tensor, rope: Tensor, owners: Tensor, text_tokens: int) -> Tiles:
    """Queries and keys normalised by RMS and rotated, and values, as `reference.to_joint_heads`.

    qkv, norms, rope: as there; owners (places) int32: which token is in a place, -1 for none.
    """
    places, size = len(owners), norms.shape[-1]
    if size > _SIZE:
        raise ValueError(f"heads have {size} channels; {_SIZE} at most")
    heads = qkv.shape[1] // 3 // size
    device = qkv.device
    room = torch.empty(3, heads * places + TILE, _SIZE, dtype=torch.uint8, device=device)
    query_scales = torch.empty(heads * places + TILE, dtype=torch.float32, device=device)
    scales = torch.empty(heads, places // TILE, 2, dtype=torch.float32, device=device)
    _tiles_kernel[(places // TILE, heads, 3)](
        qkv,
        norms,
        torch.view_as_real(rope),
        owners,
        room,
        query_scales,
        scales,
        places,
        text_tokens,
        heads,
        math.log2(math.e) / math.sqrt(size),
        room.stride(0),
        SIZE=size,
        PADDED=_SIZE,
        TILE=TILE,
        num_warps=8,
    )
    return Tiles(room[0], room[1], room[2], query_scales, scales)


class Attend:
    """The kernel, compiled for the current card."""

    def __init__(self, cache: Path | None = None) -> None:
        """Compiles it, in 0.7 s, or finds it in the folder `cache`.

        Raises:
            Exception: it cannot run here. Errors of CUDA's packages have no kind of their own.
        """
        from cuda.bindings import driver
        from cuda.core import Device, LaunchConfig

        device = Device(torch.cuda.current_device())
        device.set_current()
        self._kernel = compiled(cache).get_kernel("attend")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(
            attribute, _SHARED_BYTES, self._kernel.handle, device.device_id
        )
        if error:
            raise RuntimeError(f"attention needs {_SHARED_BYTES} bytes of shared memory: {error}")
        blocks = torch.cuda.get_device_properties().multi_processor_count
        self._config = LaunchConfig(
            grid=blocks, block=128 * (_GROUPS + 1), shmem_size=_SHARED_BYTES
        )

    def __call__(
        self, tiles: Tiles, tasks: Tensor, owners: Tensor, tokens: int, size: int
    ) -> Tensor:
        """Each row's tokens by its own only: (tokens, heads · size) bfloat16, where `owners` stand.

        tasks (M, 4) int32: place of the first of 192 queries; of its row's first token, and one
        after its last; and 0.
        """
        from cuda.core import launch

        heads = len(tiles.scales)
        result = torch.empty(tokens, heads * size, dtype=torch.bfloat16, device=owners.device)
        tensors = (
            *(tiles.queries, tiles.keys, tiles.values, tiles.query_scales, tiles.scales),
            *(tasks, owners, result),
        )
        launch(
            _CurrentStream(),
            self._config,
            self._kernel,
            *(tensor.data_ptr() for tensor in tensors),
            *(ctypes.c_int(number) for number in (len(tasks), heads, len(owners), size)),
        )
        return result


def compiled(cache: Path | None = None, log: Any = None) -> Any:
    """The kernel's object code; the compiler's remarks go to the stream `log`."""
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    source = Path(__file__).with_name("attention_sm90.cu").read_text()
    sizes = {"CHANNELS": _SIZE, "KEYS": TILE, "GROUPS": _GROUPS, "STAGES": _STAGES}
    options = ProgramOptions(
        std="c++17",
        arch="sm_90a",
        define_macro=[(name, str(size)) for name, size in sizes.items()],
        ptxas_options=["-v"] if log else None,
    )
    program = Program(source, "c++", options)
    if cache:
        try:
            return program.compile("cubin", cache=FileStreamProgramCache(cache))
        except OSError:  # a folder that cannot be written; the last start's kernel is no loss
            pass
    return program.compile("cubin", logs=log)


class _CurrentStream:
    """torch's stream, by the protocol of CUDA's Python packages."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    qkv,
    norms,
    rope,
    owners,
    room,
    query_scales,
    scales,
    places,
    text_tokens,
    heads,
    exponent,
    part_size,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.arange(0, TILE)
    owner = tl.load(owners + tile * TILE + row)[:, None]
    token = tl.maximum(owner, 0).to(tl.int64)
    column = tl.arange(0, PADDED)[None, :]
    inside = (owner >= 0) & (column < SIZE)
    width = heads * SIZE
    at = token * 3 * width + part * width + head * SIZE + column
    loaded = tl.load(qkv + at, mask=inside, other=0.0)
    start = (
        room + part.to(tl.int64) * part_size + (head.to(tl.int64) * places + tile * TILE) * PADDED
    )
    scales += 2 * (head * (places // TILE) + tile)
    if part == 2:
        x = loaded.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x)), _LEAST_VALUE) / FP8_MAX
        scale += 0 * tl.sum(x)  # a maximum passes over NaN: the scale carries it on
        tl.store(scales + 1, tl.log2(scale))
        values = tl.trans((x * (1 / scale)).to(tl.float8e4nv)).to(tl.uint8, bitcast=True)
        _store_tile(start, values, tl.arange(0, PADDED), PADDED, TILE)
    else:
        turn = tl.load(rope + token * SIZE + column, mask=inside, other=0.0)
        of_text = tl.load(norms + part * SIZE + column, mask=column < SIZE, other=0.0)
        of_image = tl.load(norms + (2 + part) * SIZE + column, mask=column < SIZE, other=0.0)
        x = loaded.to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / SIZE + _EPSILON)
        x *= tl.where(token < text_tokens, of_text, of_image).to(tl.float32)
        cosine, sine = tl.split(tl.reshape(turn, (TILE, PADDED // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (TILE, PADDED // 2, 2)))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(turned, (TILE, PADDED))
        if part == 0:
            each = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST_AMAX) / INT8_MAX
            each += 0 * tl.sum(x, axis=1)  # nor has int8 any NaN
            tl.store(query_scales + head * places + tile * TILE + row, each * exponent)
            _store_tile(start, _int8(x * (1 / each)[:, None]), row, TILE, PADDED)
        else:
            scale = tl.maximum(tl.max(tl.abs(x)), LEAST_AMAX) / INT8_MAX
            scale += 0 * tl.sum(x)
            tl.store(scales, scale)
            stands = row // 16 * 16 + row // 2 % 2 * 8 + row // 4 % 4 * 2 + row % 2
            _store_tile(start, _int8(x * (1 / scale)), stands, TILE, PADDED)


@triton.jit
def _int8(x):  # type: ignore[no-untyped-def]
    return to_int8(x).to(tl.uint8, bitcast=True)


@triton.jit
def _store_tile(  # type: ignore[no-untyped-def]
    start, tile, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Its rows, in these rows' places, each in pieces of 16 bytes."""
    pieces = tl.reshape(tile, (ROWS, COLUMNS // 16, 16))
    row = row[:, None, None]
    piece = tl.arange(0, COLUMNS // 16)[None, :, None]
    byte = tl.arange(0, 16)[None, None, :]
    tl.store(start + row * COLUMNS + (piece ^ (row % 8)) * 16 + byte, pieces)
