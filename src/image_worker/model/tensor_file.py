"""safetensors files by their bytes: headers, single tensors, and files whose bytes are a layout.

The format: a header's length in 8 bytes, the header (JSON: each tensor's type, shape and place),
then all tensors without gaps. Where a layout has gaps there are tensors of padding.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_worker.errors import ModelMismatch
from image_worker.model.packed import Layout, Part

_PAGE = 4096  # tensors begin at a multiple of it
# Bytes. The format allows 100 MB, of which a gigabyte of objects comes; published files have 1.
_LONGEST_HEADER = 2**24
_PADDING = "padding."
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MALFORMED = (
    *(struct.error, ValueError, LookupError, TypeError, AttributeError),
    *(RecursionError, OverflowError),
)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file's header. start: of its tensors' bytes, in the file."""

    path: Path
    start: int
    parts: dict[str, Part]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Reads the header.

        Raises:
            ModelMismatch: the file is cut off or no safetensors file.
            OSError: it cannot be read.
        """
        with path.open("rb") as stream:
            try:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > min(path.stat().st_size, _LONGEST_HEADER):
                    raise ValueError("a header longer than its file, or than any published one")
                header = json.loads(stream.read(length), object_pairs_hook=_without_twins)
                metadata = dict(header.pop("__metadata__", {}).items())
                parts = {name: _part(name, entry) for name, entry in header.items()}
                end = 8 + length + _end(parts.values())
                if not parts:
                    raise ValueError("no tensors")
            except _MALFORMED as error:
                raise ModelMismatch(f"{path.name} is no safetensors file, or is cut off") from error
        size = path.stat().st_size
        if size != end:
            raise ModelMismatch(f"{path.name} is cut off: {size} bytes instead of {end}")
        return cls(path, 8 + length, parts, metadata)

    def read(self, name: str) -> Tensor:
        """One tensor, into memory of its own: a mapped file counts as this process' memory."""
        part = self.parts[name]
        memory = torch.empty(part.size, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            read_into(stream.fileno(), memory, self.start + part.start)
        return memory.view(part.dtype).view(part.shape)

    @functools.cached_property
    def layout(self) -> Layout:
        """Of a file that was written from one."""
        parts = [part for name, part in self.parts.items() if not name.startswith(_PADDING)]
        size = max(part.start + part.size for part in self.parts.values())
        return Layout(tuple(parts), json.loads(self.metadata.get("aliases", "{}")), size)


def header(layout: Layout) -> bytes:
    """What stands before a layout's bytes in a file."""
    entries: dict[str, Any] = {"__metadata__": {"aliases": json.dumps(dict(layout.aliases))}}
    end = 0
    for number, part in enumerate(layout.parts):
        if part.start > end:
            entries[f"{_PADDING}{number}"] = _entry(
                torch.uint8, [part.start - end], end, part.start
            )
        end = part.start + part.size
        entries[part.name] = _entry(part.dtype, list(part.shape), part.start, end)
    if layout.size > end:
        entries[f"{_PADDING}end"] = _entry(torch.uint8, [layout.size - end], end, layout.size)
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return struct.pack("<Q", len(text)) + text


def bytes_of(memory: Tensor) -> memoryview:
    """The bytes of a tensor on the host, contiguous, without a copy."""
    found: Any = memory.view(torch.uint8).numpy()
    return memoryview(found)


def read_into(descriptor: int, memory: Tensor, offset: int) -> None:
    """Fills `memory` (bytes, on the host) from a file's bytes at `offset` on.

    Raises:
        OSError: the file ends before, or cannot be read.
    """
    view = bytes_of(memory)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise OSError("the file ends early")
        view, offset = view[count:], offset + count


def _entry(dtype: torch.dtype, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}


def _part(name: str, entry: dict[str, Any]) -> Part:
    start, end = entry["data_offsets"]
    if any(type(size) is not int or size < 0 for size in (start, *entry["shape"])):
        raise ValueError(f"{name} has sizes that are none")
    part = Part(name, _TYPES[entry["dtype"]], torch.Size(entry["shape"]), start)
    size = math.prod(entry["shape"]) * part.dtype.itemsize  # torch's own product may overflow
    if not part.size == size == end - start:
        raise ValueError(f"{name} has {end - start} bytes, not {part.size}")
    return part


def _end(parts: Iterable[Part]) -> int:
    """Where the last tensor ends. They lie one after the other, without gaps."""
    end = 0
    for part in sorted(parts, key=lambda part: (part.start, part.size)):
        if part.start != end:
            raise ValueError(f"{part.name} overlaps another tensor, or has a gap before it")
        end += part.size
    return end


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found
