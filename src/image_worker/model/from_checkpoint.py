"""A component from a file in a format of its own: what `weights` does for the model's files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from image_worker.model.checkpoint import Checkpoint
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.packed import move, slots
from image_worker.model.weights import Storage
from image_worker.settings import Precision

if TYPE_CHECKING:
    from image_worker.model.modulation import Read

META = torch.device("meta")


def load(
    module: nn.Module,
    checkpoint: Checkpoint,
    storage: Storage,
    device: torch.device,
    stays: Callable[[str], bool],
) -> None:
    """Fills `module`, which is on the meta device. Layers that stay on disk are not read.

    storage: its dtype and `on_disk` count, since the file has formats of its own; stays: as of
    `weights.load`.

    Raises:
        ModelMismatch: what is read is damaged.
    """
    linears = _loaded(checkpoint, storage)
    with tqdm(total=len(linears), desc=checkpoint.label, unit="layer", disable=None) as bar:
        for path in linears:
            layer = checkpoint.linear(path, device, storage.dtype)
            layer.requires_grad_(False)
            if not stays(f"{path}.weight"):
                move(list(slots(layer)), torch.device("cpu"))
            module.set_submodule(path, layer)
            bar.update()
    for name in sorted(checkpoint.others):
        path, _, leaf = name.rpartition(".")
        there = device if stays(name) else torch.device("cpu")
        tensor = checkpoint.other(name).to(there, storage.dtype)
        setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def empty(module: nn.Module, checkpoint: Checkpoint, storage: Storage) -> None:
    """What `load` makes of `module`, without any tensor."""
    for path in _loaded(checkpoint, storage):
        module.set_submodule(path, checkpoint.linear(path, META, storage.dtype))


def stored_bytes(
    shapes: Mapping[str, torch.Size], checkpoint: Checkpoint, storage: Storage
) -> dict[str, int]:
    """What `load` will keep, in bytes: of a layer all under its weight's name."""
    found = {
        f"{path}.weight": checkpoint.stored_bytes(path) for path in _loaded(checkpoint, storage)
    }
    return found | {
        name: storage.dtype.itemsize * shapes[name].numel() for name in checkpoint.others
    }


def layers(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Read:
    """Reads layers that stay on disk, in `dtype`, decoded on the device.

    Several threads read ahead, and the plan keeps no room for what each of them decodes: so it is
    one of them at a time.
    """
    one_at_a_time = threading.Lock()

    def read(path: str) -> tuple[Tensor, Tensor]:
        with one_at_a_time:
            weight, bias = checkpoint.full(path, device)
            return weight.to(dtype), bias.to(dtype)

    return read


def like(checkpoint: Checkpoint) -> Precision:
    """The precision of ours that its products are most like: in what they can be multiplied."""
    kinds = {type(checkpoint.linear(path, META, torch.bfloat16)) for path in checkpoint.linears}
    if CodedLinear in kinds:
        return "4bit"
    return "fp8" if Fp8Linear in kinds else "bf16"


def _loaded(checkpoint: Checkpoint, storage: Storage) -> list[str]:
    return [path for path in sorted(checkpoint.linears) if not storage.on_disk(path)]
