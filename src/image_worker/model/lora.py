"""LoRA files: reading them, checking that they fit, and adding them to weights.

A LoRA is merged into bf16 weights before these are quantised: merged afterwards, the rounding of
a 4-bit weight swallows nearly all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from image_worker.errors import ModelMismatch

# Prefixes that trainers put before the transformer's own module names.
_PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.")
_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<down>lora_down|lora_A)(?:\.default)?\.weight"
    r"|(?P<up>lora_up|lora_B)(?:\.default)?\.weight"
    r"|(?P<alpha>alpha))"
)


@dataclass(frozen=True)
class LoraPair:
    """One module's low-rank change: `weight += scale * up @ down`.

    down: (rank, in_features); up: (out_features, rank); scale = alpha / rank, or 1 without alpha
    (Hu et al., 2021, section 4.1).
    """

    down: Tensor
    up: Tensor
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """The changed weight, (out_features, in_features), in `weight`'s type."""
        up, down = (part.to(weight.device, torch.float32) for part in (self.up, self.down))
        return torch.addmm(weight.float(), up, down, alpha=self.scale).to(weight.dtype)


class Lora:
    """A LoRA file whose every tensor is understood. Which modules were merged is kept count of."""

    def __init__(self, name: str, pairs: dict[str, LoraPair]) -> None:
        self.name = name
        self.pairs = pairs
        self._merged: set[str] = set()

    @classmethod
    def read(cls, path: Path, only: Callable[[str], bool] = lambda name: True) -> Lora:  # noqa: ARG005
        """Reads `lora_down`/`lora_up`/`alpha` or `lora_A`/`lora_B` files, with or without prefix.

        only: which modules' changes to read.

        Raises:
            ModelMismatch: no safetensors file, a tensor that is no part of a LoRA, or a half pair.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names if only(_module(name))}
                metadata = file.metadata() or {}
        except Exception as error:  # safetensors raises its own, OS and value errors alike
            raise ModelMismatch(f"{path.name} is not a readable safetensors file") from error
        if "lora_adapter_metadata" in metadata:
            raise ModelMismatch(
                f"{path.name} keeps its scales in its metadata, as peft writes them; save it with "
                "an alpha per module"
            )
        return cls(path.name, _pairs(path.name, tensors) if tensors or not names else {})

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
                wrong.append(f"{name} is no linear layer of the model")
                continue
            shape = (pair.up.shape[0], pair.down.shape[1])
            expected = (module.out_features, module.in_features)
            if shape != expected or pair.up.shape[1] != pair.down.shape[0]:
                wrong.append(f"{name} is {shape} in the file and {expected} in the model")
        if wrong:
            raise ModelMismatch(
                f"{self.name} does not fit the model: {len(wrong)} of {len(self.pairs)} modules, "
                f"the first: {wrong[0]}"
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


def _pairs(name: str, tensors: dict[str, Tensor]) -> dict[str, LoraPair]:
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_without_prefix(key))
        if match is None:
            unknown.append(key)
            continue
        role = next(role for role in ("down", "up", "alpha") if match[role])
        part = parts.setdefault(match["module"], {})
        if role in part:
            raise ModelMismatch(f"{name}: {match['module']} is named twice")
        part[role] = tensor
    if unknown:
        raise ModelMismatch(
            f"{name}: {len(unknown)} of {len(tensors)} tensors are no part of a LoRA, "
            f"the first: {unknown[0]}"
        )
    _check_pairs(name, parts.items())
    return {
        module: LoraPair(part["down"], part["up"], _scale(part)) for module, part in parts.items()
    }


def _check_pairs(name: str, parts: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    found = False
    for module, part in parts:
        found = True
        if not {"down", "up"} <= part.keys():
            raise ModelMismatch(f"{name}: {module} has only {', '.join(sorted(part))}")
        if part["down"].ndim != 2 or part["up"].ndim != 2:
            raise ModelMismatch(f"{name}: {module} is not a pair of matrices")
        if 0 in part["down"].shape or ("alpha" in part and part["alpha"].numel() != 1):
            raise ModelMismatch(f"{name}: {module} has no rank, or more than one alpha")
    if not found:
        raise ModelMismatch(f"{name} holds no LoRA")


def _scale(part: dict[str, Tensor]) -> float:
    rank = part["down"].shape[0]
    return part["alpha"].item() / rank if "alpha" in part else 1.0


def _module(key: str) -> str:
    """Whose change the tensor of that name is; the name itself, where it is no LoRA's."""
    match = _KEY.fullmatch(_without_prefix(key))
    return match["module"] if match else key


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key
