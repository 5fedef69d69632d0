"""How nunchaku lays out a layer's tensors, undone: plain rows of plain columns.

Its kernel multiplies by `mma.m16n8k64` and loads each thread's share of a tile at once, so numbers
stand in files in the order in which threads hold them. A warp has 32 lanes: 8 along the outputs
("rows") by 4 along the inputs. Sources: PTX's description of the fragments of m16n8k64 and
m16n8k16, and deepcompressor's packer, which writes these files. A layer that does not fill its
last tile is padded there; what is added is cut off here.

Modulation's layers have TinyChat's layout instead (Lin et al., 2024, AWQ), which four rows share.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # rows of a tile; inputs are padded to as many
GROUP = 64  # weights of a row that share a scale
FACTOR_TILE = 16  # rows and columns of a tile of low-rank factors
_WORD = 8  # weights of 4 bits in a word of 32


def padded(size: int, tile: int = TILE) -> int:
    """What a size is filled up to."""
    return -(-size // tile) * tile


def codes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Signed 4-bit values, (rows, columns / 2) uint8: of two the earlier in the lower half.

    packed: int8 (rows, columns / 2), both padded. A lane's words of 8 weights stay whole: only they
    are moved.
    """
    tall, half = packed.shape
    words = packed.view(torch.int32).view(
        tall // TILE,
        2 * half // GROUP,  # tiles along the inputs
        8,  # of 16 rows each
        8,  # lanes
        4,  # lanes along the inputs
        2,  # of 8 rows each
        2,  # of 32 inputs each
    )
    plain = words.permute(0, 2, 5, 3, 1, 6, 4).reshape(tall, 2 * half // _WORD)
    return plain.view(torch.uint8)[:rows, : columns // 2].contiguous()


def scales(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Of groups, (rows, columns / 64), from (groups, rows), both padded.

    A lane holds four: of two neighbours, and of the two 8 rows further.
    """
    return _of_lanes(packed, padded(rows))[:rows, : columns // GROUP].contiguous()


def vector(packed: Tensor, size: int) -> Tensor:
    """Numbers for each row or each input, in the order of `scales`: (size) from one padded."""
    return _of_lanes(packed, len(packed)).flatten()[:size].contiguous()


def _of_lanes(packed: Tensor, size: int) -> Tensor:
    """(size, groups)."""
    lanes = packed.reshape(size // TILE, -1, 8, 4, 2, 2)
    return lanes.permute(0, 2, 4, 3, 5, 1).reshape(size, -1)


def down(packed: Tensor, columns: int) -> Tensor:
    """The low-rank factor that reads inputs: (rank, columns) from (columns, rank), padded."""
    tiles = _factor_tiles(packed)
    return tiles.permute(1, 2, 0, 3).reshape(packed.shape[1], -1)[:, :columns].contiguous()


def up(packed: Tensor, rows: int) -> Tensor:
    """The low-rank factor that makes outputs: (rows, rank) from the same, padded."""
    return _factor_tiles(packed).permute(0, 2, 1, 3).reshape(packed.shape)[:rows].contiguous()


def _factor_tiles(packed: Tensor) -> Tensor:
    """(tiles of channels, tiles of the rank, 16, 16): as m16n8k16 reads weights, in pairs."""
    channels, rank = (size // FACTOR_TILE for size in packed.shape)
    lanes = packed.view(channels, rank, 8, 4, 2, 2, 2)
    return lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(channels, rank, FACTOR_TILE, FACTOR_TILE)


def awq_codes(packed: Tensor) -> Tensor:
    """Unsigned 4-bit values, (rows, columns) uint8, from int32 (rows / 4, columns / 2).

    Words of 16 bits have four weights that are 8 apart, and 64 columns of four rows stand together.
    """
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    runs = packed.view(torch.uint8).view(rows // 4, columns // GROUP, 4, 32)
    pairs = runs.permute(0, 2, 1, 3).reshape(rows, columns // 32, 8, 2)
    values = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(3)
    return values.transpose(2, 3).reshape(rows, columns)


def awq_groups(columns: int) -> int:
    """How many groups AWQ's scales have room for: a word's 8 at a time, twice."""
    return padded(columns // GROUP, 2 * _WORD)
