"""Packing a module into host chunks and back, on the CPU (the card's part: tests/gpu)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from image_worker.model import offload
from image_worker.model.formats import FORMATS
from image_worker.model.packed import slots
from image_worker.settings import Precision


def _module(precision: Precision) -> nn.Module:
    torch.manual_seed(0)
    form = FORMATS[precision]
    if form is None:
        return nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512).eval())
    layer = form.encode(torch.randn(512, 256), False, torch.float32)
    return nn.Sequential(layer)


@pytest.mark.parametrize("chunk", [2**29, 4096])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "4bit"])
def test_the_module_computes_the_same_from_its_copy(
    precision: Precision, chunk: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(offload, "_CHUNK", chunk)
    module = _module(precision)
    tensors = [slot.tensor.clone() for slot in slots(module)]
    held = offload._HostCopy(module)
    held.enter(torch.device("cpu"))
    held.leave()
    for slot, before in zip(slots(module), tensors, strict=True):
        after = slot.tensor
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert after.untyped_storage().data_ptr() in {
            piece.untyped_storage().data_ptr() for piece in held._chunks
        }
    with torch.no_grad():
        fresh = _module(precision)
        x = torch.randn(8, 256)
        assert torch.equal(module(x), fresh(x))


def test_memory_that_runs_out_on_the_way_in_is_not_remembered_as_present(
    monkeypatch: Any,
) -> None:
    placement = offload.Placement(torch.device("cpu"), offload=True)
    for name in ("first", "second"):
        placement.add(name, nn.Linear(2, 2))
    placement.bring("first")
    stock, calls = offload._HostCopy.enter, []

    def enter(self: Any, device: torch.device) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        stock(self, device)

    monkeypatch.setattr(offload._HostCopy, "enter", enter)
    with pytest.raises(torch.OutOfMemoryError):
        placement.bring("second")
    placement.bring("first")
    assert len(calls) == 2, "the first must be moved in again"


def test_the_tensors_of_both_formats_are_found() -> None:
    names = {p: {slot.name for slot in slots(_module(p))} for p in ("8bit", "4bit")}
    assert names["8bit"] == {"0.weight", "0.state.CB", "0.state.SCB"}
    parts = ("codes", "scales", "scales_of_scales", "offsets", "levels", "grid")
    assert names["4bit"] == {f"0.weight.{part}" for part in parts}
