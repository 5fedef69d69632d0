"""Components that take turns on the card.

Their weights never change, so the host keeps the one copy: moving in is a single copy of one
buffer, moving out is forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Placement:
    """Puts a component on the device before it is used. Without offload there is nothing to do."""

    def __init__(self, device: torch.device, *, offload: bool) -> None:
        self.device = device
        self._offload = offload
        self._held: dict[str, _HostCopy] = {}
        self._present: str | None = None

    def add(self, name: str, module: nn.Module) -> None:
        """Takes over `module`, loaded on the device; with offload, moves it to the host."""
        if self._offload:
            self._held[name] = _HostCopy(module)
            torch.cuda.empty_cache()

    def bring(self, name: str) -> None:
        """Makes the component `name` ready to run; with offload, in place of the others."""
        if not self._offload or self._present == name:
            return
        self._present = None  # also if memory runs out on the way in
        for held in self._held.values():
            held.leave()
        torch.cuda.empty_cache()
        self._held[name].enter(self.device)
        self._present = name


class _HostCopy:
    """A module's tensors, packed into a few pinned chunks: moving in is one copy per chunk.

    Which attributes of the module refer to which part of which chunk is noted once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[Any, str, _Part]] = []
        parts: dict[tuple[int, int], _Part] = {}  # bitsandbytes names some tensors twice
        originals: list[Tensor] = []
        ends = [0]
        for owner, name in _attributes(module):
            tensor = getattr(owner, name)
            key = (tensor.data_ptr(), tensor.nbytes)
            if key not in parts:
                if ends[-1] + tensor.nbytes > _CHUNK:
                    ends.append(0)
                start = ends[-1]
                parts[key] = _Part(len(ends) - 1, start, tensor.nbytes, tensor.dtype, tensor.shape)
                originals.append(tensor.detach())
                ends[-1] = -(-(start + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
            self._places.append((owner, name, parts[key]))
        self._chunks = [_host_bytes(end) for end in ends]
        for part, tensor in zip(parts.values(), originals, strict=True):
            part.of(self._chunks).copy_(tensor)
        self.leave()

    def enter(self, device: torch.device) -> None:
        """The module refers to a new copy on the device."""
        self._point_at([chunk.to(device, non_blocking=True) for chunk in self._chunks])

    def leave(self) -> None:
        """The module refers to the host's copy; the one on the device is forgotten."""
        self._point_at(self._chunks)

    def _point_at(self, chunks: list[Tensor]) -> None:
        views = {part: part.of(chunks) for part in {part for _, _, part in self._places}}
        for owner, name, part in self._places:
            setattr(owner, name, views[part])


# torch rounds pinned memory up to a power of two: one chunk of 11 GiB would take 16.
_CHUNK = 2**29
_ALIGNMENT = 512  # as torch's own allocations on the card have it


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies, in bytes of a chunk, and what it is."""

    chunk: int
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, chunks: list[Tensor]) -> Tensor:
        flat = chunks[self.chunk][self.start : self.start + self.size]
        return flat.view(self.dtype).view(self.shape)


def _host_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _attributes(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Every attribute that holds a tensor of the module, bitsandbytes' hidden ones included."""
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                yield parameter, "data"
                yield from _quantisation_state(getattr(parameter, "quant_state", None))
        for name in owner._buffers:
            yield owner, name
        state = getattr(owner, "state", None)  # of a Linear8bitLt
        if getattr(state, "CB", None) is not None:
            yield from ((state, "CB"), (state, "SCB"))


def _quantisation_state(state: Any) -> Iterator[tuple[Any, str]]:
    """The tensors of a bitsandbytes `QuantState`, and of the one for its scales."""
    if state is not None:
        yield from ((state, "absmax"), (state, "code"))
        if state.offset is not None:
            yield state, "offset"
        yield from _quantisation_state(state.state2)
