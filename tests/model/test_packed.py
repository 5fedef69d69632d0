"""A module's tensors as bytes, and files of them that other tools read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from image_worker.errors import ModelMismatch
from image_worker.model.formats import format_of
from image_worker.model.packed import ALIGNMENT, Layout, slots, unit_of
from image_worker.model.tensor_file import TensorFile, bytes_of, header
from image_worker.settings import Precision

PRECISIONS: list[Precision] = ["bf16", "fp8", "8bit", "svdq", "4bit"]


def module(precision: Precision, *, empty: bool = False) -> nn.Module:
    """A layer of odd sizes, one without weights of its own, and a buffer."""
    torch.manual_seed(0)
    form = format_of(precision)
    weight = torch.randn(96, 192, dtype=torch.bfloat16)
    if form is None:
        layer: nn.Module = nn.Linear(192, 96, device="meta" if empty else None).bfloat16()
    elif empty:
        layer = form.empty(96, 192, True, torch.bfloat16)
        layer.bias = nn.Parameter(torch.empty(96, dtype=torch.bfloat16, device="meta"))
    else:
        layer = form.encode(weight, True, torch.bfloat16)
        layer.bias = nn.Parameter(torch.randn(96).bfloat16())
    norm = nn.BatchNorm1d(7, device="meta" if empty else None)
    return nn.Sequential(layer, norm).eval().requires_grad_(False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_empty_module_filled_with_the_bytes_is_the_module(precision: Precision) -> None:
    full, empty = module(precision), module(precision, empty=True)
    layout = Layout.of(slots(full))
    memory = torch.empty(layout.size, dtype=torch.uint8)
    layout.pack(list(slots(full)), memory)
    layout.fill(slots(empty), memory)
    for before, after in zip(slots(full), slots(empty), strict=True):
        assert before.name == after.name
        assert before.tensor.dtype == after.tensor.dtype
        assert torch.equal(before.tensor, after.tensor)
        assert type(getattr(before.owner, before.attribute)) is type(
            getattr(after.owner, after.attribute)
        )
        shared = after.tensor.untyped_storage().data_ptr()
        assert shared == memory.untyped_storage().data_ptr()
        assert (after.tensor.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0
    x = torch.randn(5, 192, dtype=torch.bfloat16)
    assert torch.equal(full[0](x), empty[0](x))  # type: ignore[index]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_of_the_bytes_is_read_by_others_and_by_us(
    precision: Precision, tmp_path: Path
) -> None:
    full = module(precision)
    layout = Layout.of(slots(full))
    memory = torch.zeros(layout.size, dtype=torch.uint8)
    layout.pack(list(slots(full)), memory)
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(header(layout) + bytes_of(memory))
    named = {slot.name: slot.tensor for slot in slots(full)}
    with safe_open(path, framework="pt") as theirs:
        for part in layout.parts:
            assert torch.equal(theirs.get_tensor(part.name), named[part.name])
    ours = TensorFile.open(path)
    assert ours.start % 4096 == 0
    assert ours.layout.parts == layout.parts
    assert (ours.layout.aliases, ours.layout.size) == (layout.aliases, layout.size)
    for part in layout.parts:
        assert torch.equal(ours.read(part.name), named[part.name])


def test_others_files_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(4).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = TensorFile.open(tmp_path / "x.safetensors")
    assert found.parts.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found.read(name), tensor)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 64, b"\x02" + bytes(7) + b"{}", b"\x04" + bytes(7) + b"[[]]"],
)
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelMismatch, match=r"x\.safetensors is no safetensors file"):
        TensorFile.open(path)


def entry(start: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape or [end - start], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},  # one over the other
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 8), "b": entry(9, 12)},  # a gap
        {"a": entry(-8, 0, [8])},
        {"a": entry(0, 12, [-3, -4])},
        {"a": entry(0, 12, [3, 5])},
        {"a": entry(0, 12, [10**12, 10**12])},
        {"a": entry(0, 12) | {"dtype": "F7"}},
        {"a": entry(0, 12) | {"shape": 12}},
        {"a": entry(0, 12) | {"shape": [12.0]}},
        {"a": []},
    ],
)
def test_tensors_that_cannot_be_are_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    head = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(12))
    with pytest.raises(ModelMismatch, match=r"x\.safetensors is no safetensors file"):
        TensorFile.open(path)


@pytest.mark.parametrize(
    "head",
    [b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"__metadata__": 3}', b" " * (2**24 + 1)],
    ids=["twins", "deep", "metadata", "long"],
)
def test_headers_that_cannot_be_are_refused(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(12))
    with pytest.raises(ModelMismatch, match=r"x\.safetensors is no safetensors file"):
        TensorFile.open(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(change: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change < 0 else content + b"\0")
    with pytest.raises(ModelMismatch, match="is cut off"):
        TensorFile.open(path)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("blocks.10.attn.weight", "blocks.10"),
        ("blocks.3.bias", "blocks.03"),
        ("more.blocks.0.weight", "more.blocks.00"),
        ("other.blocks.0.weight", "rest"),
        ("blocks_in.weight", "rest"),
    ],
)
def test_units_are_blocks_and_the_rest(name: str, unit: str) -> None:
    assert unit_of(name, ["blocks", "more.blocks"]) == unit
    assert unit_of(name, []) == "rest"
