"""A file with a transformer's weights, recognised by what is in it, never by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from image_worker.errors import ModelMismatch, ModelUnavailable
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.nunchaku import NunchakuCheckpoint
from image_worker.model.formats.nunchaku_names import is_nunchaku
from image_worker.model.formats.scaled_fp8 import ZERO_COND_T, ScaledFp8, without_prefix
from image_worker.model.tensor_file import TensorFile

_WIDE = {torch.float32, torch.bfloat16, torch.float16}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80": "a pickle",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
}


@dataclass(frozen=True)
class Plain:
    """A file in 16 bits or more, under names that diffusers has, or with a prefix.

    Its weights are stored as `PRECISION_MODE` says, like those of a folder's files.
    """

    path: Path
    keys: Mapping[str, str]  # by the names that diffusers has for them
    label: ClassVar[str] = "16 bits or more"

    def rename(self, key: str) -> str | None:
        """diffusers' name for one of the file's keys; None: it is only a mark."""
        name = next(name for name, found in self.keys.items() if found == key)
        return None if name == ZERO_COND_T else name


def in_own_format(opened: Checkpoint | Plain | None) -> Checkpoint | None:
    """The file, if `PRECISION_MODE` does not say how its weights are stored."""
    return None if isinstance(opened, Plain) else opened


def open_checkpoint(path: Path, expected: TransformerConfig) -> Checkpoint | Plain:
    """expected: of the model that it is to serve.

    Raises:
        ModelMismatch: it is no such file, or of another model; says what was found.
        ModelUnavailable: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ModelUnavailable(f"the checkpoint {path.name} cannot be read: {error}") from error
    if start[:4] == b"GGUF":
        from image_worker.model.formats.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path, expected)
    # A safetensors file begins with a number, whose bytes may look like any of these.
    is_header = start[8:] == b"{"
    for magic, what in _ARCHIVES.items():
        if start.startswith(magic) and not is_header:
            raise ModelMismatch(
                f"the checkpoint {path.name} is {what}, which could run code when it is read; "
                "expected a safetensors or GGUF file"
            )
    return _of_tensors(TensorFile.open(path), expected)


def _of_tensors(file: TensorFile, expected: TransformerConfig) -> Checkpoint | Plain:
    if is_nunchaku(file):
        return NunchakuCheckpoint(file, expected)
    found = {part.dtype for part in file.parts.values()}
    if torch.float8_e4m3fn in found or torch.float8_e5m2 in found:
        return ScaledFp8(file, expected)
    if not found <= _WIDE:
        others = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found - _WIDE))
        raise ModelMismatch(
            f"the checkpoint {file.path.name} holds tensors in {others}, in no format that is "
            "known here; expected bf16, fp16, FP8 (e4m3), nunchaku's SVDQuant int4, or GGUF"
        )
    return Plain(file.path, without_prefix(file))
