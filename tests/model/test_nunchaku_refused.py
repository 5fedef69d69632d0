"""nunchaku's files that are damaged, or of another kind: refused, with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from image_worker.errors import ModelMismatch
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.nunchaku_names import is_nunchaku
from image_worker.model.lora import Lora
from image_worker.model.opening import open_checkpoint
from image_worker.model.tensor_file import TensorFile
from tests.model.test_nunchaku import CPU, EFFECTIVE, FILE, META, checkpoint
from tools.nunchaku import QUANTISATION

QKV = "transformer_blocks.1.attn.to_qkv"
with safe_open(FILE, "pt") as opened:
    CONFIG: dict[str, Any] = json.loads(opened.metadata()["config"])
FP4 = QUANTISATION | {
    "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
}


def changed(tmp_path: Path, change: Any, **metadata: str | None) -> Path:
    """The file with other tensors, or other metadata; None takes these away."""
    tensors = load_file(FILE)
    change(tensors)
    with safe_open(FILE, "pt") as file:
        known = file.metadata() | metadata
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, {name: text for name, text in known.items() if text is not None})
    return path


def unchanged(tensors: dict[str, Tensor]) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("quantization_config", FP4, "weight.dtype .* 'fp4_e2m1_all'; .* is 'int4'"),
        ("quantization_config", QUANTISATION | {"method": "gptq"}, "method .* 'gptq'.* 'svdquant'"),
        ("quantization_config", QUANTISATION | {"weight": 4}, "weight.dtype of .* is None"),
        ("quantization_config", QUANTISATION | {"rank": 64}, r"\(rank 64\).*is \(.*32\), expected"),
        ("quantization_config", QUANTISATION | {"rank": 0}, "rank of .* is 0"),
        ("quantization_config", QUANTISATION | {"rank": "32"}, "rank of .* is '32'"),
        ("quantization_config", [1], r"is \[1\], no object"),
        ("quantization_config", None, "has no quantization_config in its metadata"),
        ("config", None, "has no config in its metadata"),
        ("config", {"_class_name": "FluxTransformer2DModel"}, "is 'FluxTransformer2DModel'"),
        ("config", {"num_layers": 2}, "configuration is damaged"),
        ("config", CONFIG | {"num_layers": 10**12}, "num_layers of .* expected 1 to 149"),
        ("config", CONFIG | {"num_layers": float("inf")}, "configuration is damaged"),
        ("config", CONFIG | {"num_attention_heads": 10**9}, "expected 1 to 65536"),
        ("config", CONFIG | {"num_attention_heads": 2**14}, "the width of .* is 524288, expected"),
        ("config", CONFIG | {"num_attention_heads": -4}, "expected 1 to 65536"),
        ("config", CONFIG | {"num_attention_heads": 3}, "width of .* is 96, expected a multiple"),
        (
            "config",
            CONFIG | {"num_layers": 1},
            "faults, the first: transformer_blocks.1.*not known",
        ),
        ("config", CONFIG | {"num_layers": 3}, "faults, the first: transformer_blocks.2.*missing"),
    ],
)
def test_other_metadata_are_refused(name: str, value: Any, complaint: str, tmp_path: Path) -> None:
    text = None if value is None else json.dumps(value)
    with pytest.raises(ModelMismatch, match=complaint):
        checkpoint(changed(tmp_path, unchanged, **{name: text}))


@pytest.mark.parametrize("metadata", [{}, {"quantization_config": None, "config": None}])
def test_fp4_is_recognised_by_what_is_in_it(metadata: dict[str, None], tmp_path: Path) -> None:
    """Scales in FP8 for groups of 16, one for the weight, and one for each row."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("attn.to_qkv.wscales")]:
            path, rows = name.removesuffix(".wscales"), tensors[name].shape[-1]
            tensors[name] = torch.ones(8, rows).to(torch.float8_e4m3fn)
            tensors[f"{path}.wtscale"] = torch.ones(1, dtype=torch.bfloat16)
            tensors[f"{path}.wcscales"] = torch.ones(rows, dtype=torch.bfloat16)

    path = changed(tmp_path, change, **metadata)
    with pytest.raises(ModelMismatch, match=r"is in nunchaku's fp4, .*to_qkv.wscales is in FP8"):
        open_checkpoint(path, TransformerConfig.parse(CONFIG))
    with pytest.raises(ModelMismatch, match=r"takes LoRAs, and this is a whole transformer in nun"):
        Lora.read(path)


def test_without_its_metadata_a_file_in_int4_is_refused_as_one(tmp_path: Path) -> None:
    path = changed(tmp_path, unchanged, quantization_config=None)
    with pytest.raises(ModelMismatch, match="has no quantization_config in its metadata"):
        open_checkpoint(path, TransformerConfig.parse(CONFIG))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, unchanged, model_class="NunchakuFluxTransformer2dModel")
    with pytest.raises(ModelMismatch, match=r"model_class of .* 'NunchakuFluxTransformer2dModel'"):
        checkpoint(path)


def test_metadata_that_are_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="none in JSON"):
        checkpoint(changed(tmp_path, unchanged, quantization_config="{"))


def test_the_rank_need_not_be_told(tmp_path: Path) -> None:
    path = changed(tmp_path, unchanged, quantization_config=json.dumps(QUANTISATION))
    assert checkpoint(path).label == "SVDQuant int4, rank 32"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (f"{QKV}.qweight", None, f"1 faults, the first: {QKV}.qweight is missing"),
        ("img_in.bias", None, "1 faults, the first: img_in.bias is missing"),
        (f"{QKV}.wtscale", torch.zeros(1), f"1 faults, the first: {QKV}.wtscale is not known"),
        (f"{QKV}.wscales", torch.ones(2, 256), r"wscales is \(2, 256\), expected \(2, 384\)"),
        (
            f"{QKV}.qweight",
            torch.zeros(384, 64),
            "qweight is in torch.float32, expected torch.int8",
        ),
        (f"{QKV}.bias", torch.zeros(384, dtype=torch.int8), "bias is in torch.int8, expected"),
        (f"{QKV}.proj_up", torch.zeros(384, 16), r"proj_up is \(384, 16\), expected \(384, 32\)"),
        (f"{QKV}.proj_up", torch.zeros(384, 32), "proj_up is in torch.float32, expected torch.bf"),
        ("transformer_blocks.2.attn.norm_q.weight", torch.ones(32), "norm_q.weight is not known"),
        ("txt_norm.weight", torch.ones(32), r"txt_norm.weight is \(32,\), expected \(64,\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, value: Tensor | None, complaint: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    with pytest.raises(ModelMismatch, match=complaint):
        checkpoint(changed(tmp_path, change))


def test_a_whole_block_that_is_missing_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("transformer_blocks.1.")]:
            del tensors[name]

    with pytest.raises(ModelMismatch, match=r"faults, the first: transformer_blocks.1.attn"):
        checkpoint(changed(tmp_path, change))


@pytest.mark.parametrize(
    ("leaf", "value", "complaint"),
    [
        ("wscales", float("nan"), "wscales of .* not finite"),
        ("proj_down", float("inf"), "proj_down of .* not finite"),
        ("bias", float("-inf"), "bias of .* not finite"),
        ("smooth_factor", 0.0, "smooth_factor of .* has zeros"),
    ],
)
def test_numbers_that_are_none_are_refused_when_they_are_read(
    leaf: str, value: float, complaint: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QKV}.{leaf}"].view(-1)[7] = value

    found = checkpoint(changed(tmp_path, change))
    path = "transformer_blocks.1.attn.to_k"
    found.linear(path, META, torch.bfloat16)
    for read in (lambda: found.linear(path, CPU, torch.bfloat16), lambda: found.full(path, CPU)):
        with pytest.raises(ModelMismatch, match=complaint):
            read()


def test_modulation_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer_blocks.0.txt_mod.1.wzeros"][0, 0] = float("nan")

    with pytest.raises(ModelMismatch, match=r"wzeros of .* not finite"):
        checkpoint(changed(tmp_path, change)).full("transformer_blocks.0.txt_mod.1", CPU)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, unchanged)
    found = checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelMismatch, match="cut off"):
        checkpoint(path)
    with pytest.raises(ModelMismatch, match="cannot be read: the file ends early"):
        for name in found.linears:
            found.full(name, CPU)


def test_which_files_are_of_this_kind(tmp_path: Path) -> None:
    assert is_nunchaku(TensorFile.open(FILE))
    fp4 = changed(tmp_path, unchanged, quantization_config=json.dumps(FP4))
    assert is_nunchaku(TensorFile.open(fp4))
    assert not is_nunchaku(TensorFile.open(EFFECTIVE))
