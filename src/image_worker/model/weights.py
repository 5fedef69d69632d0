"""Streams a component's checkpoint into its module: shard by shard, tensor by tensor.

Per tensor: read, move to the device, cast, add the LoRA's change, quantise, put in place. So no
more than one full-precision weight is on the card, and no more than one shard mapped, at a time.
Layers that are needed now and then only stay in their files: `Layers` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model.formats import Format
from image_worker.model.lora import Lora
from image_worker.model.packed import move, slots
from image_worker.model.tensor_file import TensorFile

Rename = Callable[[str], str | None]
Cut = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Storage:
    """How a component's weights are kept.

    `format_of(name)`: how the weight of the linear layer of that name is stored; None: in `dtype`,
    like all else. `on_disk(name)`: whether that layer is not loaded, but read whenever it is
    needed.
    """

    dtype: torch.dtype
    format_of: Callable[[str], Format | None] = lambda name: None  # noqa: ARG005
    on_disk: Callable[[str], bool] = lambda name: False  # noqa: ARG005


def load(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    storage: Storage,
    device: torch.device,
    *,
    loras: Sequence[Lora] = (),
    label: str = "",
    stays: Callable[[str], bool] = lambda name: True,  # noqa: ARG005
) -> None:
    """Puts tensors into `module`, whose parameters are on the meta device, by its names for them.

    Of layers that stay on disk only the shapes count. stays: whether what is made of a tensor
    stays on `device`, or goes to the host.

    Raises:
        ModelMismatch: a tensor without a place, a place without a tensor, a shape that differs, or
            a LoRA that was not merged whole.
    """
    for lora in loras:
        lora.check_fits(module)
    missing = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for target, tensor in tensors:
        if target not in missing:
            raise ModelMismatch(
                f"{label}: the checkpoint has {target}, which the model has not (its own names may "
                "be others)"
            )
        missing.remove(target)
        _check_shape(module, target, tensor.shape)
        if not storage.on_disk(target.rpartition(".")[0]):
            _place(module, target, tensor, storage, device, loras)
            if not stays(target):
                owner = module.get_submodule(target.rpartition(".")[0])
                move([slot for slot in slots(owner) if slot.tensor.is_cuda], torch.device("cpu"))
    if missing:
        raise ModelMismatch(
            f"{label}: the checkpoint lacks {len(missing)} tensors, the first: {min(missing)}"
        )
    for lora in loras:
        lora.check_merged(later=storage.on_disk)


def empty(module: nn.Module, storage: Storage) -> None:
    """What `load` makes of `module`, without any tensor: its parameters stay on the meta device."""
    for path, layer in list(module.named_modules()):
        form = storage.format_of(path) if isinstance(layer, nn.Linear) else None
        if form is not None:
            bias = layer.bias is not None
            found = form.empty(layer.out_features, layer.in_features, bias, storage.dtype)
            found.bias = layer.bias
            module.set_submodule(path, found)


class Layers:
    """Linear layers that stay in their files: weight and bias, read whenever they are asked for.

    Calls may come from several threads.
    """

    def __init__(
        self,
        files: Sequence[Path],
        loras: Sequence[Lora],
        dtype: torch.dtype,
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """loras: merged into what is read, as they are into what is loaded; keys: what files call
        their tensors, where they have other names.
        """
        self._keys = keys
        self._files = {name: found for found in map(TensorFile.open, files) for name in found.parts}
        self._loras, self._dtype = loras, dtype

    def __call__(self, path: str) -> tuple[Tensor, Tensor]:
        """Of the layer of that name: (out, in) and (out)."""
        names = (f"{path}.weight", f"{path}.bias")
        keys = [self._keys.get(name, name) for name in names]
        weight, bias = (self._files[key].read(key).to(self._dtype) for key in keys)
        return with_loras(weight, path, self._loras), bias


def _check_shape(module: nn.Module, name: str, shape: torch.Size) -> None:
    path, _, leaf = name.rpartition(".")
    expected = getattr(module.get_submodule(path), leaf).shape
    if shape != expected:
        raise ModelMismatch(
            f"{name} is {tuple(shape)} in the checkpoint, {tuple(expected)} in the model"
        )


def with_loras(weight: Tensor, path: str, loras: Sequence[Lora]) -> Tensor:
    """The weight of the layer `path` with their changes, in its type."""
    if not any(path in lora.pairs for lora in loras):
        return weight
    wide = weight.float()  # so that several are summed before they are rounded
    for lora in loras:
        wide = lora.merge(path, wide)
    return wide.to(weight.dtype)


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
    tensor = tensor.to(device=device, dtype=storage.dtype)
    if leaf == "weight":
        tensor = with_loras(tensor, path, loras)
    is_weight = leaf == "weight" and isinstance(owner, nn.Linear)
    form = storage.format_of(path) if is_weight else None
    if form is None:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        return
    layer = form.encode(tensor, owner.bias is not None, storage.dtype)
    layer.bias = owner.bias  # loaded already, or still to come
    layer.requires_grad_(False)
    module.set_submodule(path, layer)


def shapes(
    files: list[Path], rename: Rename = lambda name: name, cut: Cut | None = None
) -> dict[str, torch.Size]:
    """Of what `load` will take from files, by the module's names, from the files' headers alone.

    Raises:
        ModelMismatch: a file is cut off or no safetensors file.
    """
    found = {}
    for file in files:
        for name, part in TensorFile.open(file).parts.items():
            target, shape = rename(name), part.shape
            if target is None:
                continue
            if cut is not None:
                shape = cut(torch.empty(shape, device="meta")).shape
            found[target] = shape
    return found


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The same, from the module that is to be filled: without any file."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: parameter.shape for name, parameter in parameters}


def stored_bytes(shapes: Mapping[str, torch.Size], storage: Storage) -> dict[str, int]:
    """What `load` will keep of each tensor, in bytes."""
    found = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if storage.on_disk(path):
            continue
        form = storage.format_of(path) if leaf == "weight" and len(shape) == 2 else None
        found[name] = form.size(*shape) if form else storage.dtype.itemsize * shape.numel()
    return found


def read(
    files: list[Path],
    label: str = "",
    rename: Rename = lambda name: name,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are needed, file by file, with a progress bar in a terminal.

    rename: the module's name for a checkpoint's tensor, or None for one that is not needed;
    cut: the part of a checkpoint's tensor that is needed, if not all of it.
    """
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    target, tensor = rename(name), shard.get_tensor(name)
                    if target is not None:
                        yield target, tensor if cut is None else cut(tensor)
                    bar.update(tensor.nbytes)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelMismatch(f"{file.name} is no valid safetensors file") from error
