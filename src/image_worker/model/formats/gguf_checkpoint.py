"""A transformer in one GGUF file, as city96's converter for ComfyUI and llama.cpp's tools write it.

Tensors have diffusers' names, with or without a prefix. Files hold no configuration, so it is found
in their shapes.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.kernels.gguf_blocks import NUMBERS, TYPES
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.gguf import GgufWeight
from image_worker.model.formats.gguf_file import GgufFile, GgufTensor
from image_worker.model.shapes import BLOCK, Shapes, config_of, expected
from image_worker.model.skeleton import Linear

ARCHITECTURE = "qwen_image"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# An empty tensor by which ComfyUI's files of Qwen-Image-Edit-2511 say that references are modulated
# as if their timestep were 0. Diffusers has zero_cond_t in the configuration for that.
ZERO_COND = "__index_timestep_zero__"
_RESHAPED = "comfy.gguf.orig_shape."  # of a tensor, in the metadata, before it was reshaped
_LIGHTNING = re.compile(r"lightning.{0,40}?(?<!\d)([48])[ _-]?steps?", re.IGNORECASE)
_SERVED = 2  # bytes of a number that is not coded, as it serves on a card
_NAMED = 3  # tensors that a message names, at most


class GgufCheckpoint:
    """As of `Checkpoint`.

    Layers of one product are multiplied at once, so within a block either all layers of attention
    and MLPs are coded or none is: where some are quantised, the others are in `GgufWeight`, too,
    with the numbers that the file has.
    """

    def __init__(self, path: Path, config: TransformerConfig | None = None) -> None:
        """Reads the header.

        config: the model's own, to which the file must fit; None: found in the file. A file says
        nothing of how positions turn a head's numbers, so without it heads must be of 128, as in
        all published models. Where the file has no mark of ComfyUI's, zero_cond_t is the config's.

        Raises:
            ModelMismatch: it is damaged, of another architecture, or of a type that is unknown
                here; tensors are missing, unknown, or of other shapes.
            OSError: it cannot be read.
        """
        self.path = path
        self._file = GgufFile.open(path)
        _check_architecture(self._file)
        self._tensors = _named(self._file)
        marked = self._tensors.pop(ZERO_COND, None) is not None
        found = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.config = config or config_of(found, zero_cond_t=marked, label=path.name)
        if marked and not self.config.zero_cond_t:
            raise ModelMismatch(
                f"{path.name} has {ZERO_COND}, so it is of a model like Qwen-Image-Edit-2511; the "
                "one that it is to serve as has zero_cond_t off"
            )
        linears, shapes = expected(self.config)
        self._check_complete(shapes)
        self.linears: Set[str] = linears
        self.others: Set[str] = shapes.keys() - {
            f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")
        }
        self.label = _label([self._tensors[f"{path}.weight"] for path in linears])
        self.lightning_steps = _lightning_steps(self._file)

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """As of `Checkpoint`."""
        weight = self._tensors[f"{path}.weight"]
        if self._is_coded(path):
            layer: Any = CodedLinear(self._coded(weight, device))
        else:
            rows, columns = weight.shape
            layer = Linear(columns, rows, device="meta", dtype=dtype)
            layer.weight = self._served(weight, device, dtype)
        layer.bias = self._served(self._tensors[f"{path}.bias"], device, dtype)
        return layer  # type: ignore[no-any-return]

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """As of `Checkpoint`."""
        return tuple(  # type: ignore[return-value]
            self._numbers(self._tensors[f"{path}.{leaf}"], device) for leaf in ("weight", "bias")
        )

    def other(self, name: str) -> Tensor:
        """As of `Checkpoint`; what is quantised comes in float32."""
        return self._numbers(self._tensors[name], torch.device("cpu"))

    def _numbers(self, tensor: GgufTensor, device: torch.device) -> Tensor:
        weight = self._read(tensor, device)
        if tensor.type in NUMBERS:
            return weight.data.view(NUMBERS[tensor.type]).view(tensor.shape)
        found = torch.empty(weight.shape, device=device)
        weight.decode(found)
        return found.view(tensor.shape)

    def stored_bytes(self, path: str) -> int:
        """As of `Checkpoint`; of what is not coded, 16 bits a number."""
        weight, bias = (self._tensors[f"{path}.{leaf}"] for leaf in ("weight", "bias"))
        size = weight.size if self._is_coded(path) else _SERVED * math.prod(weight.shape)
        return size + _SERVED * math.prod(bias.shape)

    def _is_coded(self, path: str) -> bool:
        block = BLOCK.fullmatch(path)
        if self._tensors[f"{path}.weight"].type not in NUMBERS:
            return True
        return block is not None and "_mod." not in path and int(block[1]) in self._coded_blocks

    @functools.cached_property
    def _coded_blocks(self) -> Set[int]:
        """Numbers of blocks with quantised layers, modulation apart, which is no product's."""
        matches = (BLOCK.fullmatch(path) for path in self.linears if "_mod." not in path)
        return {
            int(match[1])
            for match in matches
            if match and self._tensors[f"{match[0]}.weight"].type not in NUMBERS
        }

    def _coded(self, tensor: GgufTensor, device: torch.device) -> GgufWeight:
        """On `device`."""
        if device.type == "meta":
            return _weight(tensor, torch.empty(tensor.size, dtype=torch.uint8, device="meta"))
        return self._read(tensor, device)

    def _served(self, tensor: GgufTensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        if device.type == "meta":
            found = torch.empty(tensor.shape, dtype=dtype, device="meta")
        else:
            found = self.other(tensor.name).to(device, dtype)
        return nn.Parameter(found, requires_grad=False)

    def _read(self, tensor: GgufTensor, device: torch.device | None = None) -> GgufWeight:
        """Its bytes, checked where they are."""
        found = _weight(tensor, self._file.read(tensor).to(device or "cpu"))
        if not found.is_finite():
            raise ModelMismatch(
                f"{self._file.path.name}: {tensor.name} is damaged: it has numbers "
                "that are not finite"
            )
        return found

    def _check_complete(self, shapes: Shapes) -> None:
        label = self._file.path.name
        if missing := shapes.keys() - self._tensors.keys():
            raise ModelMismatch(f"{label} lacks {_listed(missing)}")
        if unknown := self._tensors.keys() - shapes.keys():
            raise ModelMismatch(f"{label} has {_listed(unknown)}, which the model has not")
        for name, tensor in self._tensors.items():
            if tensor.shape != shapes[name]:
                raise ModelMismatch(
                    f"{label}: {name} is {tensor.shape} in the file, {shapes[name]} in the model"
                )
            if tensor.type not in TYPES:
                raise ModelMismatch(
                    f"{label}: {name} is in {tensor.type}; this worker reads {', '.join(TYPES)}"
                )


def _weight(tensor: GgufTensor, data: Tensor) -> GgufWeight:
    columns = tensor.shape[-1]
    values, size = tensor.block
    return GgufWeight(data.view(-1, columns // values * size), tensor.type, tensor.block)


def _check_architecture(file: GgufFile) -> None:
    """What says nothing of it is judged by its tensors."""
    from gguf.constants import Keys

    found = file.metadata.get(Keys.General.ARCHITECTURE, ARCHITECTURE)
    if found != ARCHITECTURE:
        raise ModelMismatch(
            f"{file.path.name} holds a model of the architecture {str(found)[:80]!r}; "
            f"this worker serves {ARCHITECTURE!r}"
        )


def _named(file: GgufFile) -> dict[str, GgufTensor]:
    """Tensors by diffusers' names, in their own shapes."""
    found: dict[str, GgufTensor] = {}
    for tensor in file.tensors.values():
        shape = file.metadata.get(_RESHAPED + tensor.name, tensor.shape)
        if not _is_shape(shape) or math.prod(shape) != math.prod(tensor.shape):
            raise ModelMismatch(
                f"{file.path.name}: {tensor.name} is of shape {tensor.shape}, and by its metadata "
                f"it was of {str(shape)[:80]}"
            )
        if shape and shape[-1] % tensor.block[0]:
            raise ModelMismatch(
                f"{file.path.name}: {tensor.name} has rows of {shape[-1]}, which {tensor.type} "
                f"does not store one by one: its blocks are of {tensor.block[0]}"
            )
        name = _without_prefix(tensor.name)
        if name in found:
            raise ModelMismatch(f"{file.path.name} has {name} with a prefix and without")
        found[name] = GgufTensor(name, tensor.type, shape, tensor.block, tensor.start)
    return found


def _is_shape(found: Any) -> bool:
    return isinstance(found, tuple) and all(type(size) is int and size >= 0 for size in found)


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _label(weights: Iterable[GgufTensor]) -> str:
    """GGUF and its layers' types, most bytes first."""
    sizes: Counter[str] = Counter()
    for tensor in weights:
        sizes[tensor.type] += tensor.size
    return "GGUF " + "/".join(name for name, _ in sizes.most_common())


def _lightning_steps(file: GgufFile) -> int | None:
    """By the model's name in its metadata."""
    from gguf.constants import Keys

    match = _LIGHTNING.search(str(file.metadata.get(Keys.General.NAME)))
    return int(match[1]) if match else None


def _listed(names: Set[str]) -> str:
    """How many tensors, and the first of them."""
    first = ", ".join(sorted(names)[:_NAMED])
    return f"{len(names)} tensors, the first: {first}" if len(names) > 1 else f"the tensor {first}"
