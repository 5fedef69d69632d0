"""GGUF files: their header, read within bounds, and the bytes of single tensors.

The format (ggml's docs/gguf.md): magic, version, how many tensors and entries of metadata there
are; the metadata; of each tensor its name, dimensions, type and place; then, at a multiple of the
alignment, all tensors' bytes. Files come from anywhere, so whatever a header says is checked before
it is believed: nothing in it decides how much memory is taken.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_worker.errors import ModelMismatch
from image_worker.model.tensor_file import read_into

MOST_HEADER = 16 << 20  # bytes; that of the full model has 0.2 MiB
_MOST_TENSORS = 1 << 14  # the full model has 1933
_MOST_ENTRIES = 1 << 16
_MOST_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_LONGEST_NAME = 127  # of tensors: as ComfyUI's converter has it; ggml's own limit is 63
_LONGEST_KEPT = 8  # of arrays: what is longer is passed over, since nothing here needs it
_VERSIONS = (2, 3)  # 1 has lengths of 32 bits, and nobody writes it
_SCALARS = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "FLOAT32": "f",
    "BOOL": "?",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT64": "d",
}


class _Damaged(Exception):
    """What is wrong, without the file's name."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    type: its name in ggml, such as Q4_K; shape: as torch has it, the reverse of the file's;
    block: values, and bytes, that are stored together; start: its first byte, in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        values, stored = self.block
        return math.prod(self.shape) // values * stored


@dataclass(frozen=True)
class GgufFile:
    """A file's header. metadata: numbers, texts, and short arrays as tuples."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Reads the header.

        Raises:
            ModelMismatch: it is no GGUF file, damaged, cut off, or of types that ggml has not.
            OSError: it cannot be read.
        """
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(min(size, MOST_HEADER))
        try:
            return cls(path, *_parse(_Cursor(data, cut=size > len(data)), size))
        except _Damaged as error:
            raise ModelMismatch(f"{path.name}: {error}") from error

    def read(self, tensor: GgufTensor) -> Tensor:
        """A tensor's bytes, into memory of their own: a mapped file counts as this process'.

        Raises:
            ModelMismatch: the file has become shorter.
            OSError: it cannot be read.
        """
        memory = torch.empty(tensor.size, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < tensor.start + tensor.size:
                raise ModelMismatch(f"{self.path.name} is cut off")
            read_into(stream.fileno(), memory, tensor.start)
        return memory


class _Cursor:
    """Reads a header's parts, each only if it is there whole."""

    def __init__(self, data: bytes, *, cut: bool) -> None:
        """cut: the file has more bytes than these."""
        self._data, self._cut = data, cut
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.skip(count)
        return self._data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        """Goes on."""
        left = len(self._data) - self.at
        if count > left:
            limit = f"more than {MOST_HEADER} bytes, or damaged" if self._cut else "cut off"
            raise _Damaged(f"its header is {limit}: it asks for {count} bytes where {left} are")
        self.at += count

    def number(self, kind: str) -> Any:
        """Of a kind that `struct` names."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """Its length, then as many bytes of UTF-8."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise _Damaged("a text of its header is no UTF-8") from error


def _parse(cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors of a file of `size` bytes."""
    from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, Keys

    magic = cursor.take(4)
    if magic != struct.pack("<I", GGUF_MAGIC):
        raise _Damaged(f"it is no GGUF file: it begins with {magic!r}")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise _Damaged(f"it is GGUF of version {version:#x}; this worker reads 2 and 3")
    tensors = _limited("tensors", cursor.number("Q"), _MOST_TENSORS)
    entries = _limited("entries of metadata", cursor.number("Q"), _MOST_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in metadata:
            raise _Damaged(f"its metadata has {key[:80]!r} twice")
        metadata[key] = _value(cursor, cursor.number("I"))
    alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its alignment is {alignment!r}, no power of two")
    found: dict[str, GgufTensor] = {}
    for _ in range(tensors):
        tensor = _tensor(cursor, alignment)
        if tensor.name in found:
            raise _Damaged(f"it has the tensor {tensor.name} twice")
        found[tensor.name] = tensor
    start = -(-cursor.at // alignment) * alignment  # from where the header's places count
    return metadata, _placed(found, start, size)


def _limited(what: str, count: int, most: int) -> int:
    if count > most:
        raise _Damaged(f"its header counts {count} {what}, of which there are no more than {most}")
    return count


def _value(cursor: _Cursor, kind: int) -> Any:
    """Of metadata; None for an array that is passed over."""
    name = _kind(kind)
    if name == "STRING":
        return cursor.text()
    if name != "ARRAY":
        return cursor.number(_SCALARS[name])
    element, length = _kind(cursor.number("I")), cursor.number("Q")
    if element == "ARRAY":
        raise _Damaged("its metadata has arrays of arrays")
    if element == "STRING":
        texts = length <= _LONGEST_KEPT
        return tuple(cursor.text() for _ in range(length)) if texts else _skip_texts(cursor, length)
    if length > _LONGEST_KEPT:
        return cursor.skip(length * struct.calcsize(f"<{_SCALARS[element]}"))
    return tuple(cursor.number(_SCALARS[element]) for _ in range(length))


def _skip_texts(cursor: _Cursor, count: int) -> None:
    """Ends where the header does, whatever the count is."""
    for _ in range(count):
        cursor.skip(cursor.number("Q"))


def _kind(number: int) -> str:
    """Of a metadata's value."""
    from gguf.constants import GGUFValueType

    try:
        return str(GGUFValueType(number).name)
    except ValueError as error:
        raise _Damaged(f"its metadata has a value of type {number}, which GGUF has not") from error


def _tensor(cursor: _Cursor, alignment: int) -> GgufTensor:
    """Of the table; `start` is still counted from where tensors begin."""
    name = cursor.text()
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise _Damaged(f"its header has {name[:_LONGEST_NAME]!r} for the name of a tensor")
    count = cursor.number("I")
    if count > _MOST_DIMENSIONS:
        raise _Damaged(f"{name} has {count} dimensions, more than {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
    kind, block = _type(name, cursor.number("I"))
    start = cursor.number("Q")
    if block[0] > 1 and (not shape or shape[-1] % block[0]):
        raise _Damaged(f"{name} of shape {shape} is in {kind}, whose rows are of {block[0]}s")
    if start % alignment:
        raise _Damaged(f"{name} begins at {start}, no multiple of the alignment, {alignment}")
    return GgufTensor(name, kind, shape, block, start)


def _type(name: str, number: int) -> tuple[str, tuple[int, int]]:
    """A tensor's type, and its block's values and bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        found = GGMLQuantizationType(number)
        return found.name, GGML_QUANT_SIZES[found]
    except (ValueError, KeyError) as error:
        raise _Damaged(f"{name} is of type {number}, which is unknown here") from error


def _placed(tensors: dict[str, GgufTensor], start: int, size: int) -> dict[str, GgufTensor]:
    """Of a file of `size` bytes, whose tensors begin at `start`: each inside, none in another."""
    found = {
        name: GgufTensor(name, tensor.type, tensor.shape, tensor.block, start + tensor.start)
        for name, tensor in tensors.items()
    }
    end, before = start, ""
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start + tensor.size > size:
            raise _Damaged(
                f"it is cut off, or damaged: {tensor.name} would end at byte "
                f"{tensor.start + tensor.size} of {size}"
            )
        if tensor.size and tensor.start < end:
            raise _Damaged(f"its tensors {before} and {tensor.name} overlap")
        end, before = max(end, tensor.start + tensor.size), tensor.name
    return found
