"""A module's tensors as one run of bytes, the same on disk, on the host and on the card.

A slot is a place that holds a tensor; a layout says where in the bytes each slot's tensor lies. To
move a module is to copy its bytes and to fill its slots with views of the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HOST = "host"  # the unit of tensors that never go to the card
ALIGNMENT = 512  # bytes; as torch's own allocations on a card have it


@dataclass(frozen=True)
class Slot:
    """An attribute that holds a tensor of a module: a parameter, a buffer, or bitsandbytes' own."""

    name: str
    owner: Any
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """What it holds."""
        held: Tensor = getattr(self.owner, self.attribute)
        return held.detach()

    def fill(self, tensor: Tensor) -> None:
        """Has it hold `tensor`; a parameter is replaced by one of its kind, with all it knows."""
        held = getattr(self.owner, self.attribute)
        if isinstance(held, nn.Parameter):
            known = held.__dict__
            tensor = torch.Tensor._make_subclass(type(held), tensor, False)
            tensor.__dict__.update(known)
        setattr(self.owner, self.attribute, tensor)


def slots(module: nn.Module) -> Iterator[Slot]:
    """All of a module's, bitsandbytes' hidden ones included."""
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield Slot(prefix + name, owner, name)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield Slot(prefix + name, owner, name)
        state = getattr(owner, "state", None)  # of a Linear8bitLt
        if getattr(state, "CB", None) is not None:
            yield from (Slot(f"{prefix}state.{name}", state, name) for name in ("CB", "SCB"))


def unit_of(name: str, lists: Iterable[str]) -> str:
    """What the tensor of that name is moved with: its block, named as its list and number, or the
    rest of the module.

    lists: the names of the lists that blocks are in.
    """
    for blocks in lists:
        if name.startswith(f"{blocks}."):
            number = name[len(blocks) + 1 :].partition(".")[0]
            return f"{blocks}.{int(number):02d}"
    return "rest"


@dataclass(frozen=True)
class Part:
    """One tensor among the bytes: it starts at byte `start`."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, a view of `memory` (bytes)."""
        return memory[self.start : self.start + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where tensors lie: `parts` in their order, and slots that hold the same tensor as another."""

    parts: tuple[Part, ...]
    aliases: Mapping[str, str]
    size: int

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> Layout:
        """One after the other, each at a multiple of `ALIGNMENT`. Tensors on meta have none."""
        parts: dict[tuple[int, int] | str, Part] = {}
        aliases: dict[str, str] = {}
        end = 0
        for slot in slots:
            tensor = slot.tensor
            # bitsandbytes names some tensors twice. What is empty has no place.
            place = (tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else slot.name
            if place in parts:
                aliases[slot.name] = parts[place].name
                continue
            parts[place] = Part(slot.name, tensor.dtype, tensor.shape, end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts.values()), aliases, end)

    def pack(self, slots: Sequence[Slot], memory: Tensor) -> None:
        """Copies what slots hold to `memory` (bytes, of this size)."""
        tensors = {slot.name: slot.tensor for slot in slots}
        for part in self.parts:
            part.of(memory).copy_(tensors[part.name])

    def fill(self, slots: Iterable[Slot], memory: Tensor) -> None:
        """Slots hold views of `memory` (bytes, of this size)."""
        views = {part.name: part.of(memory) for part in self.parts}
        for slot in slots:
            slot.fill(views[self.aliases.get(slot.name, slot.name)])


def move(slots: Sequence[Slot], device: torch.device) -> None:
    """Slots hold the same on `device`, in one run of bytes."""
    layout = Layout.of(slots)
    memory = torch.empty(layout.size, dtype=torch.uint8, device=device)
    layout.pack(slots, memory)
    layout.fill(slots, memory)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; of tensors on meta, which have shapes only, another one on meta.

    torch's own `cat` of those goes through Python and imports its compiler, which takes seconds of
    a start.
    """
    first = tensors[0]
    if not first.is_meta:
        return torch.cat(list(tensors))
    rows = sum(len(tensor) for tensor in tensors)
    return torch.empty(rows, *first.shape[1:], dtype=first.dtype, device="meta")
