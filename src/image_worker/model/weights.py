"""Streams a component's checkpoint into its module: shard by shard, tensor by tensor.

Per tensor: read, move to the device, cast, add the LoRA's change, quantise, put in place. So no
more than one full-precision weight is on the card, and no more than one shard mapped, at a time;
but layers that stay off the card keep their shards mapped (`Storage.on_host`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model.formats import Format
from image_worker.model.lora import Lora

Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class Storage:
    """How a component's weights are kept.

    `stores(name)` says whether the linear layer of that name is kept in `format`; all else is kept
    in `dtype`. `on_host(name)`: whether that layer stays off the card, mapped from its file where
    nothing is merged into it.
    """

    dtype: torch.dtype
    format: Format | None
    stores: Callable[[str], bool]
    on_host: Callable[[str], bool] = lambda name: False  # noqa: ARG005


def load(
    module: nn.Module,
    files: list[Path],
    storage: Storage,
    device: torch.device,
    *,
    rename: Rename = lambda name: name,
    loras: Sequence[Lora] = (),
    label: str = "",
) -> None:
    """Fills `module`, whose parameters are on the meta device, from safetensors `files`.

    rename: the module's name for a checkpoint's tensor, or None for one that is not needed.

    Raises:
        ModelMismatch: a tensor without a place, a place without a tensor, a shape that differs, or
            a LoRA that was not merged whole.
    """
    for lora in loras:
        lora.check_fits(module)
    missing = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in _read(files, label):
        target = rename(name)
        if target is None:
            continue
        if target not in missing:
            raise ModelMismatch(f"{label}: the checkpoint has {name}, which the model has not")
        missing.remove(target)
        _place(module, target, tensor, storage, device, loras)
    if missing:
        raise ModelMismatch(
            f"{label}: the checkpoint lacks {len(missing)} tensors, the first: {min(missing)}"
        )
    for lora in loras:
        lora.check_merged()


def _place(
    module: nn.Module,
    name: str,
    tensor: Tensor,
    storage: Storage,
    device: torch.device,
    loras: Sequence[Lora],
) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    expected = getattr(owner, leaf).shape
    if tensor.shape != expected:
        raise ModelMismatch(
            f"{name} is {tuple(tensor.shape)} in the checkpoint, {tuple(expected)} in the model"
        )
    if storage.on_host(path):
        device = torch.device("cpu")
    tensor = tensor.to(device=device, dtype=storage.dtype)
    if leaf == "weight" and any(path in lora.pairs for lora in loras):
        wide = tensor.float()  # so that several are summed before they are rounded
        for lora in loras:
            wide = lora.merge(path, wide)
        tensor = wide.to(storage.dtype)
    quantised = storage.format is not None and leaf == "weight" and storage.stores(path)
    if not (quantised and isinstance(owner, nn.Linear)):
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        return
    assert storage.format is not None
    layer = storage.format.encode(tensor, owner.bias is not None, storage.dtype)
    layer.bias = owner.bias  # loaded already, or still to come
    layer.requires_grad_(False)
    module.set_submodule(path, layer)


def stored_bytes(files: list[Path], storage: Storage, rename: Rename = lambda name: name) -> int:
    """What `load` will keep on the device, in bytes, from the files' headers alone.

    Raises:
        ModelMismatch: a file is cut off or no safetensors file.
    """
    total = 0
    for file in files:
        for name, shape in _header(file).items():
            target = rename(name)
            if target is None:
                continue
            path, _, leaf = target.rpartition(".")
            if storage.on_host(path):
                continue
            if storage.format and leaf == "weight" and len(shape) == 2 and storage.stores(path):
                total += storage.format.size(*shape)
            else:
                total += storage.dtype.itemsize * int(torch.Size(shape).numel())
    return total


def _header(file: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file's tensors."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        shapes = {name: entry["shape"] for name, entry in header.items()}
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise ModelMismatch(f"{file.name} is no safetensors file, or is cut off") from error
    if file.stat().st_size != end:
        raise ModelMismatch(f"{file.name} is cut off: {file.stat().st_size} bytes instead of {end}")
    return shapes


def _read(files: list[Path], label: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors, with a progress bar in a terminal, file by file."""
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensor = shard.get_tensor(name)
                    yield name, tensor
                    bar.update(tensor.nbytes)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelMismatch(f"{file.name} is no valid safetensors file") from error
