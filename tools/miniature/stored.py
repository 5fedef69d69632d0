"""The miniature's transformer in files of other programs, written by their rules.

"Q4_K in any rows" is no file of theirs: rows of 128 weights are too short for K-quants, and
llama.cpp takes types with more bits for them. It is what they would lose, in a file of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from image_worker.bench.ggml import type_of
from image_worker.model.components import is_modulation
from image_worker.model.lora import Lora
from tools import ggml

MINIATURE = Path(__file__).parents[2] / "src/image_worker/miniature"
ANY_ROWS = "Q4_K in any rows"
_PREFIX = "model.diffusion_model."  # of ComfyUI's files
_BLOCKS = 7
Tensors = Mapping[str, Tensor]


def write(kind: str, folder: Path, lightning: int | None) -> Path:
    """kind: of `KINDS`; lightning: steps of the LoRA to merge first, or None."""
    tensors = load_file(MINIATURE / "transformer" / "diffusion_pytorch_model.safetensors")
    if lightning:
        name = f"miniature-lightning-{lightning}steps-V1.0-bf16.safetensors"
        lora = Lora.read(MINIATURE / "loras" / name)
        for path, pair in lora.pairs.items():
            tensors[f"{path}.weight"] = pair.add_to(tensors[f"{path}.weight"])
    suffix = "gguf" if KINDS[kind] is _gguf else "safetensors"
    file = folder / f"{kind.replace(' ', '-')}-{lightning or 'no'}-steps.{suffix}"
    KINDS[kind](file, kind, tensors)
    return file


def _is_coded(name: str, tensor: Tensor) -> bool:
    path = name.removesuffix(".weight")
    return name.startswith("transformer_blocks.") and tensor.ndim == 2 and not is_modulation(path)


def _fp8(path: Path, kind: str, tensors: Tensors) -> None:  # noqa: ARG001
    """A scale for each weight, under ComfyUI's names."""
    found = {f"{_PREFIX}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        found[_PREFIX + name] = tensor.bfloat16()
        if _is_coded(name, tensor):
            scale = tensor.float().abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            found[_PREFIX + name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[_PREFIX + name.removesuffix("weight") + "scale_weight"] = scale
    save_file(found, path)


def _gguf(path: Path, kind: str, tensors: Tensors) -> None:
    def chosen(name: str, tensor: Tensor) -> str:
        if not _is_coded(name, tensor):
            return "F32" if tensor.ndim == 1 else "BF16"
        wanted = type_of(kind, name.removesuffix(".weight"), _BLOCKS)
        return ggml.possible(wanted, tensor.shape[1])

    ggml.write(
        path,
        {name: (tensor.float().numpy(), chosen(name, tensor)) for name, tensor in tensors.items()},
    )


def _any_rows(path: Path, kind: str, tensors: Tensors) -> None:  # noqa: ARG001
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.contiguous()
        if _is_coded(name, tensor):
            coded = ggml.quantise(tensor.float().numpy().reshape(1, -1), "Q4_K")
            rounded = np.asarray(dequantize(coded, GGMLQuantizationType.Q4_K))
            found[name] = torch.from_numpy(rounded).view_as(tensor).float()
    save_file(found, path)


KINDS: dict[str, Callable[[Path, str, Tensors], None]] = {
    "FP8 file": _fp8,
    "Q8_0": _gguf,
    "Q4_K_M": _gguf,
    ANY_ROWS: _any_rows,
}
