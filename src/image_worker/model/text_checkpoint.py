"""A file with the text encoder's weights, recognised by what is in it, never by its name.

The one that ComfyUI publishes is in scaled FP8: linear layers of both networks, a scale each.
Those of the language model serve so; the vision tower's are widened, as it is kept wide here.
"""

from __future__ import annotations

from pathlib import Path

from image_worker.errors import ModelMismatch
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.components import TEXT_ENCODER, text_encoder_name
from image_worker.model.formats.scaled_fp8 import MARK, ScaledFp8, names_of, without_prefix
from image_worker.model.opening import GGUF, first_bytes, is_fp8
from image_worker.model.tensor_file import TensorFile
from image_worker.model.wide import Wide, WideFile

_PREFIXES = ("text_encoders.qwen25_7b.transformer.", "qwen25_7b.transformer.", "text_encoder.")
_EXPECTED = "expected Qwen2.5-VL's language model and vision tower, as the model's own files have"
_OTHERS = {  # of which other models' tensors have names
    "encoder.block.": "a T5 encoder",
    "text_model.": "a CLIP text encoder",
    "transformer_blocks.": "an image transformer",
}


def open_text_encoder(path: Path, folder: Path) -> Checkpoint | Wide:
    """folder: the model's text_encoder/, of which the configuration is read.

    Raises:
        ModelMismatch: it is no such file, or of another model; says what was found.
        ModelUnavailable: it cannot be read.
    """
    if first_bytes(path) == GGUF:
        raise ModelMismatch(
            f"the text encoder {path.name} is a GGUF file; expected a safetensors file in bf16, "
            "fp16 or FP8 (e4m3)"
        )
    file = TensorFile.open(path)
    _refuse_other_models(file)
    names = names_of(file, _name)
    if is_fp8(file, names, "bf16, fp16 or FP8 (e4m3)"):
        return ScaledFp8(file, names, TEXT_ENCODER.empty(folder), TEXT_ENCODER.quantised)
    return WideFile.of(path, names)


def _name(key: str) -> str | None:
    bare = without_prefix(key, _PREFIXES)
    return None if bare == MARK else text_encoder_name(bare)


def _refuse_other_models(file: TensorFile) -> None:
    found = [what for part, what in _OTHERS.items() if any(part in key for key in file.parts)]
    names = {_name(key) or "" for key in file.parts}
    if not found and not any(name.startswith("language_model.layers.") for name in names):
        found = ["no language model"]
    if not found and not any(name.startswith("visual.") for name in names):
        found = ["a language model without a vision tower"]
    if found:
        raise ModelMismatch(f"the text encoder {file.path.name} is {found[0]}; {_EXPECTED}")
