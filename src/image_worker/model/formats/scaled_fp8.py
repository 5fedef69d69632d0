"""Files in FP8 (e4m3), as ComfyUI and its kin write them: a scale for each weight, or for its rows.

Two spellings are in use, `<layer>.scale_weight` and `<layer>.weight_scale`; what such a file knows
of activations is not needed, since these are scaled by what they are. Without any scale values are
the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile

FP8 = torch.float8_e4m3fn
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# ComfyUI's mark of a model whose references are modulated at timestep 0, as 2511's are.
ZERO_COND_T = "__index_timestep_zero__"
_SCALES = ("scale_weight", "weight_scale")
_IGNORED = ("scale_input", "input_scale")  # of activations
_NOTE = "comfy_quant"  # a layer's own format, as JSON in bytes
_MARKS = ("scaled_fp8", ZERO_COND_T)
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


class ScaledFp8:
    """A `Checkpoint` whose linear layers are in FP8, or some of them."""

    lightning_steps: int | None = None  # such files do not say

    def __init__(self, file: TensorFile, expected: TransformerConfig) -> None:
        """expected: of the model that it is to serve.

        Raises:
            ModelMismatch: it belongs to another model, or is not understood as a whole.
        """
        self._file = file
        self._names = without_prefix(file)
        self.path = file.path
        self.config = expected
        with torch.device("meta"):
            skeleton = Skeleton(expected)
        self._shapes = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
        self.linears = frozenset(
            path for path, part in skeleton.named_modules() if isinstance(part, nn.Linear)
        )
        of_linears = {f"{path}.{leaf}" for path in self.linears for leaf in ("weight", "bias")}
        self.others = self._shapes.keys() - of_linears
        self._scales = self._check()
        rows = any(file.parts[scale].shape.numel() > 1 for scale in self._scales.values())
        each = "row" if rows else "weight"
        self.label = f"FP8 with a scale for each {each}" if self._scales else "FP8 without scales"

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """As of `Checkpoint`."""
        key = self._names[f"{path}.weight"]
        part = self._file.parts[key]
        bias = self._tensor(f"{path}.bias", device, dtype)
        found: nn.Module
        if part.dtype == FP8:
            rows = part.shape[0]
            if device.type == "meta":
                scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
            else:
                scales = self._scale(path).expand(rows, 1).contiguous().to(device)
            weight = self._tensor(f"{path}.weight", device, FP8)
            _check_values(path, weight)
            found = Fp8Linear(weight, scales)
        else:
            found = nn.Linear(part.shape[1], part.shape[0], device="meta", dtype=dtype)
            weight = self._tensor(f"{path}.weight", device, dtype)
            found.weight = nn.Parameter(weight, requires_grad=False)
        found.bias = nn.Parameter(bias, requires_grad=False)
        return found

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """As of `Checkpoint`."""
        weight = self.other(f"{path}.weight").to(device)
        if weight.dtype == FP8:
            _check_values(path, weight)
            weight = weight.float() * self._scale(path).to(device)
        return weight, self.other(f"{path}.bias").to(device).float()

    def other(self, name: str) -> Tensor:
        """As of `Checkpoint`."""
        return self._file.read(self._names[name])

    def stored_bytes(self, path: str) -> int:
        """As of `Checkpoint`."""
        part = self._file.parts[self._names[f"{path}.weight"]]
        rows, columns = part.shape
        # Wider ones are kept in 16 bits, biases of all layers, too.
        return rows * columns + 6 * rows if part.dtype == FP8 else 2 * rows * (columns + 1)

    def _tensor(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type == "meta":
            return torch.empty(self._shapes[name], dtype=dtype, device=device)
        return self.other(name).to(device, dtype)

    def _scale(self, path: str) -> Tensor:
        """(1, 1) or (rows, 1) float32."""
        key = self._scales.get(path)
        if key is None:
            return torch.ones(1, 1)
        scale = self._file.read(key).float().reshape(-1, 1)
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
            elif part.dtype not in (*_WIDE, FP8):
                wrong.append(f"{name} is in {part.dtype}, expected FP8 (e4m3) or a wider type")
        for name in parts.keys() - self._shapes.keys() - set(_MARKS):
            path, _, leaf = name.rpartition(".")
            known = path in self.linears
            if known and leaf in _SCALES and self._fits(path, parts):
                if parts[name].shape.numel() not in (1, self._shapes[f"{path}.weight"][0]):
                    wrong.append(f"{name} has {parts[name].shape.numel()} scales")
                scales[path] = self._names[name]
            elif not (known and (leaf in _IGNORED or (leaf == _NOTE and self._is_fp8(name)))):
                wrong.append(f"{name} is not known")
        if (ZERO_COND_T in parts) and not self.config.zero_cond_t:
            wrong.append("it is of a model with zero_cond_t, as edit-2511 is, and MODEL is not")
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
            note = json.loads(self.other(name).numpy().tobytes())
            return bool(note["format"] == "float8_e4m3fn")
        except (ValueError, LookupError, TypeError):
            return False


def without_prefix(file: TensorFile) -> dict[str, str]:
    """A file's keys by the names that diffusers has for them.

    Raises:
        ModelMismatch: two keys have the same name.
    """
    found: dict[str, str] = {}
    for key in file.parts:
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        if key[len(prefix) :] in found:
            raise ModelMismatch(f"{file.path.name} has {key[len(prefix) :]} twice")
        found[key[len(prefix) :]] = key
    return found


def _check_values(path: str, weight: Tensor) -> None:
    """FP8 of this kind has no infinity, and one NaN of each sign."""
    if not weight.is_meta and (weight.view(torch.uint8) & 0x7F).eq(0x7F).any():
        raise ModelMismatch(f"{path}.weight of the checkpoint has values that are no numbers")
