"""Files whose weights are stored as `PRECISION_MODE` says, like those of a model's folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from image_worker.errors import ModelMismatch
from image_worker.model import from_checkpoint, weights
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.lora import Lora
from image_worker.model.tensor_file import TensorFile
from image_worker.model.weights import Storage

if TYPE_CHECKING:
    from image_worker.model.modulation import Read

_META = torch.device("meta")
_SHOWN = 3  # of the faults that an error names


@dataclass(frozen=True)
class Wide(ABC):
    """A file with a component's weights as numbers, into which LoRAs are merged.

    label: its format, for people.
    """

    path: Path
    label: str

    @abstractmethod
    def tensors(self, device: torch.device, storage: Storage) -> Iterator[tuple[str, Tensor]]:
        """What `weights.load` takes: all tensors by the model's names, with a progress bar.

        device: where they are computed, if they have to be; storage: of layers that stay on disk
        the shapes are enough.

        Raises:
            ModelMismatch: what is read is damaged.
        """

    @abstractmethod
    def layers(self, loras: Sequence[Lora], device: torch.device, dtype: torch.dtype) -> Read:
        """Reads layers that stay on disk, LoRAs merged, in `dtype`; device: as of `tensors`."""

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """That `module` can be filled, from the file's header alone.

        Raises:
            ModelMismatch: tensors are missing, unknown, or of other shapes.
        """


@dataclass(frozen=True)
class WideFile(Wide):
    """Safetensors in 16 bits or more. keys: what it calls its tensors, by the model's names."""

    keys: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, keys: Mapping[str, str]) -> Self:
        """A file that was looked into."""
        return cls(path, "16 bits or more", keys)

    def tensors(self, device: torch.device, storage: Storage) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002
        """As of `Wide`."""
        names = {key: name for name, key in self.keys.items()}
        return weights.read([self.path], self.path.name, names.get)

    def layers(self, loras: Sequence[Lora], device: torch.device, dtype: torch.dtype) -> Read:  # noqa: ARG002
        """As of `Wide`."""
        return weights.Layers([self.path], loras, dtype, self.keys)

    def check(self, module: nn.Module) -> None:
        """As of `Wide`."""
        expected = weights.shapes_of(module)
        parts = TensorFile.open(self.path).parts
        found = {name: parts[key].shape for name, key in self.keys.items()}
        wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{name} is not known" for name in found.keys() - expected.keys()]
        wrong += [
            f"{name} is {tuple(found[name])}, expected {tuple(expected[name])}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ]
        if wrong:
            raise ModelMismatch(
                f"the checkpoint {self.path.name} does not fit the model: {len(wrong)} faults, the "
                f"first: {'; '.join(sorted(wrong)[:_SHOWN])}"
            )


@dataclass(frozen=True)
class Decoding(Wide):
    """A transformer's file in a format of its own, decoded once, when its weights are loaded.

    Against weights that stay in the file's format, they take the memory of the precision that they
    are stored in, and its time.
    """

    checkpoint: Checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """A file that was opened."""
        return cls(checkpoint.path, f"{checkpoint.label}, decoded", checkpoint)

    def tensors(self, device: torch.device, storage: Storage) -> Iterator[tuple[str, Tensor]]:
        """As of `Wide`."""
        linears = sorted(self.checkpoint.linears)
        for path in tqdm(linears, desc=self.label, unit="layer", disable=None):
            # Nothing here refers to a weight any more when the next one is decoded.
            names = (f"{path}.weight", f"{path}.bias")
            yield from zip(names, self._linear(path, device, storage), strict=True)
        for name in sorted(self.checkpoint.others):
            yield name, self.checkpoint.other(name)

    def _linear(self, path: str, device: torch.device, storage: Storage) -> tuple[Tensor, Tensor]:
        if not storage.on_disk(path):
            weight, bias = self.checkpoint.full(path, device)
            return weight.to(storage.dtype), bias.to(storage.dtype)
        layer: Any = self.checkpoint.linear(path, _META, storage.dtype)
        shape = (layer.out_features, layer.in_features)
        return torch.empty(shape, device=_META), torch.empty(shape[0], device=_META)

    def layers(self, loras: Sequence[Lora], device: torch.device, dtype: torch.dtype) -> Read:
        """As of `Wide`."""

        read = from_checkpoint.layers(self.checkpoint, device, dtype)

        def merged(path: str) -> tuple[Tensor, Tensor]:
            # On the host, as of files in 16 bits: the card has no room for what merging takes.
            weight, bias = (part.cpu() for part in read(path))
            return weights.with_loras(weight, path, loras), bias

        return merged

    def check(self, module: nn.Module) -> None:
        """Nothing: whoever opened the checkpoint has seen to it."""
