"""A file with a transformer's weights, recognised by what is in it, never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from image_worker.errors import ModelMismatch, ModelUnavailable
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.nunchaku import NunchakuCheckpoint
from image_worker.model.formats.nunchaku_names import is_nunchaku
from image_worker.model.formats.scaled_fp8 import (
    FP8,
    MARK,
    WIDE,
    ScaledFp8,
    names_of,
    without_prefix,
)
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile
from image_worker.model.wide import Wide, WideFile

GGUF = b"GGUF"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# ComfyUI's mark of a model whose references are modulated at timestep 0, as 2511's are.
ZERO_COND_T = "__index_timestep_zero__"
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
}


def in_own_format(opened: Checkpoint | Wide | None) -> Checkpoint | None:
    """The file, if `PRECISION_MODE` does not say how its weights are stored."""
    return None if isinstance(opened, Wide) else opened


def open_checkpoint(path: Path, expected: TransformerConfig) -> Checkpoint | Wide:
    """expected: of the model that it is to serve.

    Raises:
        ModelMismatch: it is no such file, or of another model; says what was found.
        ModelUnavailable: it cannot be read.
    """
    if first_bytes(path) == GGUF:
        from image_worker.model.formats.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path, expected)
    return _of_tensors(TensorFile.open(path), expected)


def first_bytes(path: Path) -> bytes:
    """Four, by which files are told apart.

    Raises:
        ModelMismatch: they are an archive's.
        ModelUnavailable: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ModelUnavailable(f"the checkpoint {path.name} cannot be read: {error}") from error
    if start[8:] == b"{":  # a header's length before it, whose first byte may be a pickle's, too
        return start[:4]
    for magic, what in _ARCHIVES.items():
        if start.startswith(magic):
            raise ModelMismatch(
                f"the checkpoint {path.name} is {what}, which could run code when it is read; "
                "expected a safetensors file, or for a transformer a GGUF file"
            )
    return start[:4]


def _of_tensors(file: TensorFile, expected: TransformerConfig) -> Checkpoint | Wide:
    if is_nunchaku(file):
        return NunchakuCheckpoint(file, expected)
    names = names_of(file, _name)
    if names.pop(ZERO_COND_T, None) and not expected.zero_cond_t:
        raise ModelMismatch(
            f"the checkpoint {file.path.name} is of a model with zero_cond_t, as edit-2511 is, and "
            "MODEL is not"
        )
    if is_fp8(file, names, "bf16, fp16, FP8 (e4m3), nunchaku's SVDQuant int4, or GGUF"):
        with torch.device("meta"):
            model = Skeleton(expected)
        return ScaledFp8(file, names, model)
    return WideFile.of(file.path, names)


def _name(key: str) -> str | None:
    """diffusers' name for a key of the transformer's."""
    name = without_prefix(key, _PREFIXES)
    return None if name == MARK else name


def is_fp8(file: TensorFile, names: Mapping[str, str], expected: str) -> bool:
    """Whether any of its tensors are in FP8; else all are wide.

    names: its keys, of those that are needed; expected: what is understood.

    Raises:
        ModelMismatch: neither is so.
    """
    found = {file.parts[key].dtype for key in names.values()}
    if FP8 in found or torch.float8_e5m2 in found:
        return True
    others = sorted(str(dtype).removeprefix("torch.") for dtype in found - {*WIDE})
    if others:
        raise ModelMismatch(
            f"the checkpoint {file.path.name} holds tensors in {', '.join(others)}, in no format "
            f"that is known here; expected {expected}"
        )
    return False
