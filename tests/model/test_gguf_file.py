"""GGUF headers are read within bounds: what is damaged, cut off or hostile is refused, by name."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from image_worker.errors import ModelMismatch
from image_worker.model.formats import gguf_file
from image_worker.model.formats.gguf_file import GgufFile
from tools import ggml

F32, Q8_0 = 0, 8  # types of tensors
UINT32, TEXT, ARRAY, UINT64 = 4, 8, 9, 10  # of metadata
ALIGNMENT = 32
HUGE = 1 << 62


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, start: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, start)


def header(
    tensors: list[bytes],
    entries: list[bytes] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    entries = entries or []
    counted = struct.pack("<QQ", *(counts or (len(tensors), len(entries))))
    parts = [b"GGUF", struct.pack("<I", version), counted, *entries, *tensors]
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % ALIGNMENT)


def opened(folder: Path, data: bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GgufFile.open(path)


def complaint(folder: Path, data: bytes) -> str:
    with pytest.raises(ModelMismatch) as caught:
        opened(folder, data)
    assert caught.value.message.startswith("model.gguf: ")
    return caught.value.message


def small(folder: Path) -> bytes:
    """A whole file, by the package: three tensors, of which one is quantised."""
    numbers = np.arange(128, dtype=np.float32).reshape(2, 64)
    path = ggml.write(
        folder / "small.gguf",
        {"a": (numbers, "F32"), "b": (numbers, "Q8_0"), "c": (numbers[0], "F16")},
        entries={"general.name": "Small", "sizes": [2, 64], "many": list(range(50))},
    )
    return path.read_bytes()


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    file = opened(tmp_path, small(tmp_path))
    assert file.metadata["general.architecture"] == "qwen_image"
    assert (file.metadata["sizes"], file.metadata["many"]) == ((2, 64), None)
    assert {name: (one.type, one.shape) for name, one in file.tensors.items()} == {
        "a": ("F32", (2, 64)),
        "b": ("Q8_0", (2, 64)),
        "c": ("F16", (64,)),
    }
    assert torch.equal(file.read(file.tensors["a"]).view(torch.float32), torch.arange(128.0))
    assert file.read(file.tensors["b"]).shape == (4 * 34,)


def test_empty_tensors_have_no_bytes(tmp_path: Path) -> None:
    names = [tensor("mark", (0,)), tensor("number", (), start=0)]
    file = opened(tmp_path, header(names) + bytes(4))
    assert (file.tensors["mark"].size, file.tensors["number"].size) == (0, 4)


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = small(tmp_path)
    last = max(one.start + one.size for one in opened(tmp_path, data).tensors.values())
    for size in range(last):
        complaint(tmp_path, data[:size])
    opened(tmp_path, data[:last])


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    data = small(tmp_path)
    file = opened(tmp_path, data)
    file.path.write_bytes(data[:-100])
    with pytest.raises(ModelMismatch, match="cut off"):
        file.read(file.tensors["c"])


def test_damaged_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    data, generator = small(tmp_path), random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(400)] = generator.randrange(256)
        try:
            opened(tmp_path, bytes(damaged))
        except ModelMismatch:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"PK\x03\x04" + bytes(99), r"it is no GGUF file: it begins with b'PK\x03\x04'"),
        (b"\x80\x02}q\x00." + bytes(99), "it is no GGUF file"),
        (b"", "cut off"),
        (header([], version=1), "GGUF of version 0x1"),
        (header([], version=3 << 24), "GGUF of version 0x3000000"),  # big-endian
        (header([], counts=(HUGE, 0)), f"counts {HUGE} tensors"),
        (header([], counts=(0, HUGE)), f"counts {HUGE} entries"),
        (header([], counts=(9999, 0)), "cut off"),
        (header([tensor("a", (1,))] * 2) + bytes(8), "the tensor a twice"),
        (header([], [entry("a", UINT32, bytes(4))] * 2), "has 'a' twice"),
        (header([], [entry("a", 77, bytes(4))]), "a value of type 77"),
        (header([], [entry("a", TEXT, struct.pack("<Q", HUGE))]), f"asks for {HUGE} bytes"),
        (header([], [entry("a", TEXT, text("ab")[:-1] + b"\xff")]), "no UTF-8"),
        (header([], [entry("a", ARRAY, struct.pack("<IQ", UINT64, HUGE))]), "asks for"),
        (header([], [entry("a", ARRAY, struct.pack("<IQ", TEXT, HUGE))]), "cut off"),
        (header([], [entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "arrays of arrays"),
        (header([], [entry("general.alignment", UINT32, struct.pack("<I", 0))]), "alignment is 0"),
        (header([], [entry("general.alignment", UINT32, struct.pack("<I", 48))]), "no power of"),
        (header([], [entry("general.alignment", TEXT, text("8"))]), "alignment is '8'"),
        (header([tensor("a", (1,) * 5)]) + bytes(8), "a has 5 dimensions"),
        (header([tensor("a", (HUGE, HUGE))]), "cut off, or damaged: a would end"),
        (header([tensor("a", (1,), kind=99)]) + bytes(8), "a is of type 99"),
        (header([tensor("a", (1,), kind=4)]) + bytes(8), "a is of type 4"),  # ggml dropped it
        (header([tensor("a", (3, 40), kind=Q8_0)]) + bytes(999), "of 32s"),
        (header([tensor("a", (1,), start=8)]) + bytes(99), "no multiple of the alignment"),
        (header([tensor("a", (9,), start=HUGE)]) + bytes(99), "would end at byte"),
        (header([tensor("a", (16,)), tensor("b", (1,), start=32)]) + bytes(99), "a and b overlap"),
        (header([tensor("a" * 999, (1,))]) + bytes(99), "for the name of a tensor"),
        (header([tensor("a\n", (1,))]) + bytes(99), "for the name of a tensor"),
    ],
    ids=itertools.count(),
)
def test_what_is_refused(data: bytes, expected: str, tmp_path: Path) -> None:
    assert expected in complaint(tmp_path, data)


def test_no_more_than_a_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MOST_HEADER", 64)
    found = complaint(tmp_path, small(tmp_path))
    assert "its header is more than 64 bytes, or damaged" in found
