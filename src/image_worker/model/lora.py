"""LoRA files: reading them, checking that they fit, and adding them to weights.

A LoRA is merged into bf16 weights before these are quantised: merged afterwards, the rounding of
a 4-bit weight swallows nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.lora_format import Role, Scales, other_kind, parse
from image_worker.model.tensor_file import TensorFile

_SHOWN, _LONGEST = 3, 100  # names in an error, and characters of each


@dataclass(frozen=True)
class LoraPair:
    """One module's low-rank change: `weight += scale * up @ down`.

    down: (rank, in_features); up: (out_features, rank); scale = alpha / rank, or 1 without alpha
    (Hu et al., 2021, section 4.1).
    """

    down: Tensor
    up: Tensor
    scale: float

    def add_to(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """The changed weight, (out_features, in_features), in `weight`'s type.

        scale: of the change, on top of its own.
        """
        up, down = (part.to(weight.device, torch.float32) for part in (self.up, self.down))
        alpha = self.scale * scale
        return torch.addmm(weight.float(), up, down, alpha=alpha).to(weight.dtype)


class Lora:
    """A LoRA file whose every tensor is understood. Which modules were merged is kept count of."""

    def __init__(self, name: str, pairs: dict[str, LoraPair]) -> None:
        self.name = name
        self.pairs = pairs
        self._merged: set[str] = set()

    @classmethod
    def read(cls, path: Path, only: Callable[[str], bool] = lambda name: True) -> Lora:  # noqa: ARG005
        """Reads the files of all trainers that `lora_format.py` knows; no more than their bytes.

        only: which modules' changes to read.

        Raises:
            ModelMismatch: no safetensors file, a tensor that is no part of a LoRA, a half pair, or
                values that are no numbers.
            OSError: it cannot be read.
        """
        file = _open(path)
        _check_names(path.name, file.parts)
        try:
            scales = Scales.read(file.metadata)
        except ValueError as error:
            raise ModelMismatch(f"{path.name}: {error}") from error
        tensors = {name: file.read(name) for name in file.parts if only(_module(name))}
        return cls(path.name, _pairs(path.name, tensors, scales))

    @property
    def nbytes(self) -> int:
        """Of its tensors, on the host."""
        return sum(pair.down.nbytes + pair.up.nbytes for pair in self.pairs.values())

    def check_fits(self, model: nn.Module) -> None:
        """Every module that the file names must be a linear layer of `model`, of fitting shape.

        Raises:
            ModelMismatch: says how many do not fit, and the first of them.
        """
        self._merged.clear()
        modules = dict(model.named_modules())
        wrong = []
        for name, pair in self.pairs.items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                wrong.append(f"{shown([name])} is no linear layer of the model")
                continue
            shape = (pair.up.shape[0], pair.down.shape[1])
            expected = (module.out_features, module.in_features)
            if shape != expected or pair.up.shape[1] != pair.down.shape[0]:
                wrong.append(f"{name} is {shape} in the file and {expected} in the model")
            elif len(pair.down) > max(expected):
                wrong.append(f"{name} has rank {len(pair.down)}, more than its layer")
        if wrong:
            raise ModelMismatch(
                f"{self.name} does not fit the model: {len(wrong)} of {len(self.pairs)} modules, "
                f"the first: {'; '.join(wrong[:_SHOWN])}"
            )

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """`weight` with this module's change added; `weight` itself if it has none."""
        pair = self.pairs.get(module)
        if pair is None:
            return weight
        self._merged.add(module)
        return pair.add_to(weight)

    def check_merged(
        self,
        later: Callable[[str], bool] = lambda name: False,  # noqa: ARG005
    ) -> None:
        """After loading: every pair must have found its weight, but those of modules read later.

        Raises:
            ModelMismatch: some have not.
        """
        left = [name for name in self.pairs if name not in self._merged and not later(name)]
        if left:
            raise ModelMismatch(
                f"{self.name}: {len(left)} of {len(self.pairs)} modules were not merged, "
                f"the first: {left[0]}"
            )


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile.open(path)
    except (ModelMismatch, OSError) as error:
        raise ModelMismatch(f"{path.name} is not a readable safetensors file") from error


def _check_names(name: str, keys: Iterable[str]) -> None:
    """Each must be understood, so that no part of a change is lost."""
    found = list(keys)
    unknown = [key for key in found if parse(key) is None]
    if not unknown:
        return
    kinds = sorted({kind for key in unknown if (kind := other_kind(key))})
    known = f" (this worker takes LoRAs, and this is {', '.join(kinds)})" if kinds else ""
    raise ModelMismatch(
        f"{name}: {len(unknown)} of {len(found)} tensors are no part of a LoRA{known}, "
        f"the first: {shown(unknown)}"
    )


def _pairs(name: str, tensors: Mapping[str, Tensor], scales: Scales | None) -> dict[str, LoraPair]:
    parts: dict[str, dict[Role, Tensor]] = {}
    for key, tensor in tensors.items():
        parsed = parse(key)
        assert parsed is not None
        module, role = parsed
        part = parts.setdefault(module, {})
        if role in part:
            raise ModelMismatch(f"{name}: {shown([module])} is named twice")
        part[role] = tensor
    for module, part in parts.items():
        reason = _wrong_with(part)
        if reason:
            raise ModelMismatch(f"{name}: {shown([module])} {reason}")
    if scales and any("alpha" in part for part in parts.values()):
        raise ModelMismatch(f"{name} has an alpha per module and scales in its metadata")
    return {
        module: LoraPair(part["down"], part["up"], _scale(module, part, scales))
        for module, part in parts.items()
    }


def _wrong_with(part: Mapping[Role, Tensor]) -> str | None:
    if not {"down", "up"} <= part.keys():
        return f"has only {', '.join(sorted(part))}"
    if part["down"].ndim != 2 or part["up"].ndim != 2:
        return "is not a pair of matrices"
    if 0 in part["down"].shape or ("alpha" in part and part["alpha"].numel() != 1):
        return "has no rank, or more than one alpha"
    if not all(tensor.is_floating_point() for tensor in part.values()):
        return "is not of floating-point numbers"
    if not all(torch.isfinite(tensor.float()).all() for tensor in part.values()):
        return "has values that are no numbers"
    return None


def _scale(module: str, part: Mapping[Role, Tensor], scales: Scales | None) -> float:
    rank = part["down"].shape[0]
    if scales is not None:
        return scales.of(module, rank)
    return part["alpha"].item() / rank if "alpha" in part else 1.0


def _module(key: str) -> str:
    """Whose change the tensor of that name is; the name itself, where it is no LoRA's."""
    parsed = parse(key)
    return parsed[0] if parsed else key


def shown(names: Sequence[str]) -> str:
    """The first few, each cut short: who wrote the file chose them."""
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(name[:_LONGEST] for name in names[:_SHOWN]) + more
