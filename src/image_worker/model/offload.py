"""Components that take turns on the card.

Their weights never change, so the host keeps the one copy: moving in is a single copy of one
buffer, moving out is forgetting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from image_worker.model.packed import ALIGNMENT, Part, Slot, slots


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

    Which slots of the module hold which part of which chunk is noted once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[Slot, int, Part]] = []
        parts: dict[tuple[int, int], tuple[int, Part]] = {}  # bitsandbytes names some tensors twice
        originals: list[Tensor] = []
        ends = [0]
        for slot in slots(module):
            tensor = slot.tensor
            key = (tensor.data_ptr(), tensor.nbytes)
            if key not in parts:
                if ends[-1] + tensor.nbytes > _CHUNK:
                    ends.append(0)
                part = Part(slot.name, tensor.dtype, tensor.shape, ends[-1])
                parts[key] = len(ends) - 1, part
                originals.append(tensor)
                ends[-1] += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            self._places.append((slot, *parts[key]))
        self._chunks = [_host_bytes(end) for end in ends]
        for (chunk, part), tensor in zip(parts.values(), originals, strict=True):
            part.of(self._chunks[chunk]).copy_(tensor)
        self.leave()

    def enter(self, device: torch.device) -> None:
        """The module refers to a new copy on the device."""
        self._point_at([chunk.to(device, non_blocking=True) for chunk in self._chunks])

    def leave(self) -> None:
        """The module refers to the host's copy; the one on the device is forgotten."""
        self._point_at(self._chunks)

    def _point_at(self, chunks: list[Tensor]) -> None:
        for slot, chunk, part in self._places:
            slot.fill(part.of(chunks[chunk]))


# torch rounds pinned memory up to a power of two: one chunk of 11 GiB would take 16.
_CHUNK = 2**29


def _host_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
