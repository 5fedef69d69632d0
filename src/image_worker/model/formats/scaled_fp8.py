"""Files in FP8 (e4m3), as ComfyUI and its kin write them: a scale for each weight, or for its rows.

Two spellings are in use, `<layer>.scale_weight` and `<layer>.weight_scale`; what such a file knows
of activations is not needed, since these are scaled by what they are. Without any scale values are
the weights. Which model's file it is, those say who open it: the transformer's (`opening`) or the
text encoder's (`text_checkpoint`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.tensor_file import TensorFile

FP8 = torch.float8_e4m3fn
MARK = "scaled_fp8"  # a tensor that says nothing more than its name
WIDE = (torch.float32, torch.bfloat16, torch.float16)
_SCALES = ("scale_weight", "weight_scale")
_IGNORED = ("scale_input", "input_scale")  # of activations
_NOTE = "comfy_quant"  # a layer's own format, as JSON in bytes


class ScaledFp8:
    """A `Checkpoint` whose layers are in FP8, or some of them."""

    lightning_steps: int | None = None  # such files do not say

    def __init__(
        self,
        file: TensorFile,
        names: Mapping[str, str],
        model: nn.Module,
        keeps: Callable[[str], bool] = lambda path: True,  # noqa: ARG005
    ) -> None:
        """names: the file's keys by the model's names, as of `names_of`; model: that it is to
        serve, on the meta device; keeps: whether the linear layer of a name serves as the file has
        it. Whatever else is in FP8 is widened.

        Raises:
            ModelMismatch: it belongs to another model, or is not understood as a whole.
        """
        self._file = file
        self._names = names
        self.path = file.path
        self._shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
        self.linears = frozenset(
            path
            for path, part in model.named_modules()
            if isinstance(part, nn.Linear) and keeps(path)
        )
        of_linears = {f"{path}.{leaf}" for path in self.linears for leaf in ("weight", "bias")}
        self.others = self._shapes.keys() - of_linears
        self._scales = self._check()
        rows = any(file.parts[scale].shape.numel() > 1 for scale in self._scales.values())
        each = "row" if rows else "weight"
        self.label = f"FP8 with a scale for each {each}" if self._scales else "FP8 without scales"

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """As of `Checkpoint`."""
        part = self._file.parts[self._names[f"{path}.weight"]]
        found: Fp8Linear | nn.Linear
        if part.dtype == FP8:
            rows = part.shape[0]
            if device.type == "meta":
                scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
            else:
                scales = self._scale(path, 2).expand(rows, 1).contiguous().to(device)
            weight = self._tensor(f"{path}.weight", device, FP8)
            _check_values(f"{path}.weight", weight)
            found = Fp8Linear(weight, scales)
        else:
            found = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta", dtype=dtype)
            weight = self._tensor(f"{path}.weight", device, dtype)
            found.weight = nn.Parameter(weight, requires_grad=False)
        if self._has_bias(path):
            bias = self._tensor(f"{path}.bias", device, dtype)
            found.bias = nn.Parameter(bias, requires_grad=False)
        return found

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """As of `Checkpoint`."""
        weight = self._widened(f"{path}.weight", device)
        return weight, self._widened(f"{path}.bias", device).float()

    def other(self, name: str) -> Tensor:
        """As of `Checkpoint`."""
        return self._widened(name, torch.device("cpu"))

    def stored_bytes(self, path: str) -> int:
        """As of `Checkpoint`."""
        part = self._file.parts[self._names[f"{path}.weight"]]
        rows, columns = part.shape
        # Wider ones are kept in 16 bits, biases of all layers, too.
        weight = rows * columns + 4 * rows if part.dtype == FP8 else 2 * rows * columns
        return weight + 2 * rows * self._has_bias(path)

    def _has_bias(self, path: str) -> bool:
        return f"{path}.bias" in self._shapes

    def _tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type == "meta":
            return torch.empty(self._shapes[name], dtype=dtype, device=device)
        if dtype == FP8:
            return self._file.read(self._names[name]).to(device)
        return self._widened(name, device).to(dtype)

    def _widened(self, name: str, device: torch.device) -> Tensor:
        """The values that a tensor stands for: float32 where it is in FP8, else the file's type."""
        path, _, leaf = name.rpartition(".")
        tensor = self._file.read(self._names[name]).to(device)
        if tensor.dtype != FP8:
            return tensor
        _check_values(name, tensor)
        scale = self._scale(path, tensor.ndim) if leaf == "weight" else torch.ones(1)
        return tensor.float() * scale.to(device)

    def _scale(self, path: str, dimensions: int) -> Tensor:
        """Of a weight with so many dimensions: (1, 1, …) or (rows, 1, …) float32."""
        key = self._scales.get(path)
        if key is None:
            return torch.ones((1,) * dimensions)
        scale = self._file.read(key).float().reshape(-1, *(1,) * (dimensions - 1))
        if not (torch.isfinite(scale).all() and (scale >= 0).all()):
            raise ModelMismatch(f"{key} of the checkpoint is no scale: it is {scale.min().item()}")
        return scale

    def _check(self) -> dict[str, str]:
        """The scales' keys by their layers' paths. All that is in the file must be understood."""
        wrong: list[str] = []
        scales: dict[str, str] = {}
        parts = {name: self._file.parts[key] for name, key in self._names.items()}
        for name, shape in self._shapes.items():
            part = parts.get(name)
            if part is None:
                wrong.append(f"{name} is missing")
            elif part.shape != shape:
                wrong.append(f"{name} is {tuple(part.shape)}, expected {tuple(shape)}")
            elif part.dtype not in (*WIDE, FP8):
                wrong.append(f"{name} is in {part.dtype}, expected FP8 (e4m3) or a wider type")
        for name in parts.keys() - self._shapes.keys():
            path, _, leaf = name.rpartition(".")
            known = f"{path}.weight" in self._shapes
            if known and leaf in _SCALES and self._fits(path, parts):
                if parts[name].shape.numel() not in (1, self._shapes[f"{path}.weight"][0]):
                    wrong.append(f"{name} has {parts[name].shape.numel()} scales")
                if path in scales:
                    wrong.append(f"{path} has scales under two names")
                scales[path] = self._names[name]
            elif not (known and (leaf in _IGNORED or (leaf == _NOTE and self._is_fp8(name)))):
                wrong.append(f"{self._names[name]} is not known")
        if wrong:
            raise ModelMismatch(
                f"the checkpoint {self._file.path.name} does not fit the model: "
                f"{len(wrong)} faults, the first: {'; '.join(sorted(wrong)[:3])}"
            )
        return scales

    def _fits(self, path: str, parts: Mapping[str, object]) -> bool:
        part = parts.get(f"{path}.weight")
        return getattr(part, "dtype", None) == FP8

    def _is_fp8(self, name: str) -> bool:
        try:
            note = json.loads(self._file.read(self._names[name]).numpy().tobytes())
            return bool(note["format"] == "float8_e4m3fn")
        except (ValueError, LookupError, TypeError):
            return False


def names_of(file: TensorFile, rename: Callable[[str], str | None]) -> dict[str, str]:
    """A file's keys by the model's names for them. rename: such a name, None for what is not
    needed.

    Raises:
        ModelMismatch: two keys have the same name.
    """
    found: dict[str, str] = {}
    for key in file.parts:
        name = rename(key)
        if name in found:
            raise ModelMismatch(f"{file.path.name} has {name} twice")
        if name is not None:
            found[name] = key
    return found


def without_prefix(key: str, prefixes: Iterable[str]) -> str:
    """The key without the first of the prefixes that it begins with."""
    prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
    return key[len(prefix) :]


def _check_values(name: str, values: Tensor) -> None:
    """FP8 of this kind has no infinity, and one NaN of each sign."""
    if not values.is_meta and (values.view(torch.uint8) & 0x7F).eq(0x7F).any():
        raise ModelMismatch(f"{name} of the checkpoint has values that are no numbers")
