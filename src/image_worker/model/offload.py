"""Components that take turns on the card.

Their weights never change, so the host keeps the one copy: moving in is a single copy of one
buffer, moving out is forgetting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


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
        for held in self._held.values():
            held.leave()
        torch.cuda.empty_cache()
        self._held[name].enter(self.device)
        self._present = name


class _HostCopy:
    """A module's tensors, one after the other in one pinned buffer: moving in is a single copy.

    Which attributes of the module refer to which part of the buffer is noted once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[Any, str, _Part]] = []
        parts: dict[tuple[int, int], _Part] = {}  # bitsandbytes names some tensors twice
        originals: list[Tensor] = []
        end = 0
        for owner, name in _attributes(module):
            tensor = getattr(owner, name)
            key = (tensor.data_ptr(), tensor.nbytes)
            if key not in parts:
                parts[key] = _Part(end, tensor.nbytes, tensor.dtype, tensor.shape)
                originals.append(tensor.detach())
                end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._places.append((owner, name, parts[key]))
        self._buffer = _pinned(end)
        for part, tensor in zip(parts.values(), originals, strict=True):
            part.of(self._buffer).copy_(tensor)
        self.leave()

    def enter(self, device: torch.device) -> None:
        """The module refers to a new copy of the buffer on the device."""
        self._point_at(self._buffer.to(device, non_blocking=True))

    def leave(self) -> None:
        """The module refers to the buffer on the host; the copy on the device is forgotten."""
        self._point_at(self._buffer)

    def _point_at(self, buffer: Tensor) -> None:
        views = {part: part.of(buffer) for part in {part for _, _, part in self._places}}
        for owner, name, part in self._places:
            setattr(owner, name, views[part])


@dataclass(frozen=True)
class _Part:
    """Where in the buffer a tensor lies, in bytes, and what it is."""

    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.shape)


_ALIGNMENT = 256  # of CUDA allocations; kernels read 16 bytes at a time


def _pinned(size: int) -> Tensor:
    """Page-locked host bytes, of exactly this size: torch's own pinning rounds up to 2ⁿ."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(status):
            log.warning("host memory could not be pinned: moving weights will be slower")
    return buffer


def _attributes(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Every attribute that holds a tensor of the module, bitsandbytes' hidden ones included."""
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                yield parameter, "data"
                state = getattr(parameter, "quant_state", None)
                if state is not None:
                    yield from ((state, "absmax"), (state, "code"))
        for name in owner._buffers:
            yield owner, name
        state = getattr(owner, "state", None)  # of a Linear8bitLt
        if getattr(state, "CB", None) is not None:
            yield from ((state, "CB"), (state, "SCB"))
