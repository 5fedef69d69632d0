"""Files in GGUF, and weights in ggml's types: the package's, and K-quants, which it only decodes.

These K-quants are honest and simple: scales span what a part holds. llama.cpp searches better ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Array = np.ndarray[Any, np.dtype[Any]]
# What llama.cpp takes for rows that are no multiple of 256 (its Q4_0 is IQ4_NL by now).
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def block_of(name: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return values, size


def possible(name: str, columns: int) -> str:
    """The type that rows of `columns` get where `name` is asked for."""
    return FALLBACK[name] if name in FALLBACK and columns % 256 else name


def quantise(values: Array, name: str) -> Array:
    """(rows, columns) float32 to (rows, bytes) uint8, or float32 or float16. Bytes stay bytes."""
    if values.dtype == np.uint8:
        return values
    if name not in _QUANTISERS:
        found: Array = gguf.quants.quantize(values, GGMLQuantizationType[name])
        return found
    blocks = values.astype(np.float32).reshape(-1, 256)
    return _QUANTISERS[name](blocks).reshape(len(values), -1)


def write(
    path: Path,
    tensors: Mapping[str, tuple[Array, str]],
    *,
    architecture: str | None = "qwen_image",
    entries: Mapping[str, str | Sequence[int]] | None = None,
) -> Path:
    """A file of tensors, float32 or blocks, each in the type that is named beside it."""
    writer = gguf.GGUFWriter(path, architecture or "")
    if architecture is None:
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    for key, value in (entries or {}).items():
        add: Any = writer.add_string if isinstance(value, str) else writer.add_array
        add(key, value)
    for name, (values, kind) in tensors.items():
        raw = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantise(values, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_offsets(blocks: Array, part: int, bits: int, most: int) -> tuple[Array, ...]:
    """Codes (N, 256), scales and offsets (N, 256 / part) as integers to `most`, and what these are
    multiplied by, (N, 1) float16 each."""
    parts = blocks.reshape(len(blocks), -1, part)
    low = np.minimum(parts.min(axis=2), 0)
    steps = (np.maximum(parts.max(axis=2), 0) - low) / (2**bits - 1)
    scale, offset = (_half(x.max(axis=1, keepdims=True) / most) for x in (steps, -low))
    scales, offsets = (_divided(x, y, 0, most) for x, y in ((steps, scale), (-low, offset)))
    width = (scale.astype(np.float32) * scales)[:, :, None]
    start = (offset.astype(np.float32) * offsets)[:, :, None]
    codes = _divided(parts + start, width, 0, 2**bits - 1).reshape(len(blocks), 256)
    return codes, scales, offsets, scale, offset


def _centred(blocks: Array, bits: int, most: int) -> tuple[Array, Array, Array]:
    """Codes (N, 256) from 0 on, of which the middle one means 0; scales (N, 16) as integers to
    `most`; what these are multiplied by, (N, 1) float16."""
    parts = blocks.reshape(len(blocks), 16, 16)
    middle = 2 ** (bits - 1)
    steps = np.abs(parts).max(axis=2) / (middle - 1)
    scale = _half(steps.max(axis=1, keepdims=True) / most)
    scales = _divided(steps, scale, 0, most)
    width = (scale.astype(np.float32) * scales)[:, :, None]
    codes = _divided(parts, width, -middle, middle - 1) + middle
    return codes.reshape(len(blocks), 256), scales, scale


def _half(values: Array) -> Array:
    return values.astype(np.float16)


def _divided(values: Array, by: Array, least: int, most: int) -> Array:
    """The nearest integers, in bounds."""
    wide = np.broadcast_to(by.astype(np.float32), values.shape)
    found = np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)
    return np.clip(np.rint(found), least, most).astype(np.int32)


def _packed(codes: Array, bits: int, run: int) -> Array:
    """(N, bytes) uint8: of each 8 / bits runs of codes, the first in the lowest bits."""
    runs = codes.reshape(len(codes), -1, 8 // bits, run)
    shifts = np.arange(8 // bits).reshape(-1, 1) * bits
    found: Array = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(codes), -1)
    return found


def _joined(*parts: Array) -> Array:
    """Bytes side by side."""
    return np.concatenate(
        [x.view(np.uint8) if x.dtype == np.float16 else x.astype(np.uint8) for x in parts], axis=1
    )


def _q2_k(blocks: Array) -> Array:
    codes, scales, offsets, scale, offset = _with_offsets(blocks, 16, 2, 15)
    return _joined(scales | offsets << 4, _packed(codes, 2, 32), scale, offset)


def _q3_k(blocks: Array) -> Array:
    codes, scales, scale = _centred(blocks, 3, 31)
    raised = scales + 32
    low = _packed(raised & 15, 4, 8)
    high = _packed(raised >> 4, 2, 4)
    return _joined(_packed(codes >> 2, 1, 32), _packed(codes & 3, 2, 32), low, high, scale)


def _six_bits(scales: Array, offsets: Array) -> Array:
    first, second = (x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales, offsets))
    return _joined(first, second, scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4)


def _q4_k(blocks: Array) -> Array:
    codes, scales, offsets, scale, offset = _with_offsets(blocks, 32, 4, 63)
    return _joined(scale, offset, _six_bits(scales, offsets), _packed(codes, 4, 32))


def _q5_k(blocks: Array) -> Array:
    codes, scales, offsets, scale, offset = _with_offsets(blocks, 32, 5, 63)
    high, low = _packed(codes >> 4, 1, 32), _packed(codes & 15, 4, 32)
    return _joined(scale, offset, _six_bits(scales, offsets), high, low)


def _q6_k(blocks: Array) -> Array:
    codes, scales, scale = _centred(blocks, 6, 127)
    return _joined(_packed(codes & 15, 4, 64), _packed(codes >> 4, 2, 32), scales, scale)


_QUANTISERS: dict[str, Callable[[Array], Array]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
