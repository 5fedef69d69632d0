"""FP8 files as other programs write them: exact scales, no noise, and nothing half understood."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.components import TRANSFORMER
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.formats.scaled_fp8 import ScaledFp8
from image_worker.model.in_folder import read_json
from image_worker.model.opening import ZERO_COND_T, open_checkpoint
from tests.conftest import MINI_FOLDER, read_mini

CPU, META = torch.device("cpu"), torch.device("meta")
FP8 = torch.float8_e4m3fn
CONFIG = TransformerConfig.parse(read_json(MINI_FOLDER / "transformer" / "config.json"))
LAYER = "transformer_blocks.3.attn.to_q"
MODULATION = "transformer_blocks.3.img_mod.1"


def weights(*, lora: bool = True) -> dict[str, Tensor]:
    """The miniature's, under diffusers' names, with Lightning merged."""
    source = read_mini(TRANSFORMER, torch.bfloat16, lora=lora)
    return {name: tensor.detach().contiguous() for name, tensor in source.named_parameters()}


def quantised(
    tensors: dict[str, Tensor], *, spelling: str = "scale_weight", rows: bool = False
) -> dict[str, Tensor]:
    """As ComfyUI's converters do it: the largest value of a weight, or of its row, becomes 448."""
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in tensors.items():
        found[name] = tensor
        if tensor.ndim == 2 and name.startswith("transformer_blocks."):
            wide = tensor.float()
            largest = wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax()
            scale = largest.clamp(min=1e-6) / 448
            found[name] = (wide / scale).to(FP8)
            path = name.removesuffix(".weight")
            found[f"{path}.{spelling}"] = scale
            found[f"{path}.scale_input"] = torch.tensor(0.5)
    return found


def checkpoint(tensors: dict[str, Tensor], folder: Path, prefix: str = "") -> ScaledFp8:
    path = folder / "file.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    found = open_checkpoint(path, CONFIG)
    assert isinstance(found, ScaledFp8)
    return found


@pytest.mark.parametrize(
    ("prefix", "spelling", "rows"),
    [
        ("model.diffusion_model.", "scale_weight", False),
        ("", "weight_scale", False),
        ("diffusion_model.", "weight_scale", True),
    ],
)
def test_scales_are_applied(prefix: str, spelling: str, rows: bool, tmp_path: Path) -> None:
    whole = weights()
    tensors = quantised(whole, spelling=spelling, rows=rows)
    found = checkpoint(tensors, tmp_path, prefix)
    assert found.label == f"FP8 with a scale for each {'row' if rows else 'weight'}"
    for path in sorted(found.linears):
        layer: Any = found.linear(path, CPU, torch.float32)
        expected = whole[f"{path}.weight"].float()
        assert torch.equal(layer.bias, whole[f"{path}.bias"].float())
        full, bias = found.full(path, CPU)
        assert torch.equal(bias, layer.bias)
        if path.startswith("transformer_blocks."):
            assert isinstance(layer, Fp8Linear)
            scale = tensors[f"{path}.{spelling}"].reshape(-1, 1)
            assert torch.equal(layer.scales, scale.expand(len(expected), 1))
            assert torch.equal(
                layer.weight.view(torch.uint8), tensors[f"{path}.weight"].view(torch.uint8)
            )
            assert torch.equal(full, tensors[f"{path}.weight"].float() * scale)
            error = (full - expected).norm() / expected.norm()
            assert 0.005 < error < 0.04  # three bits behind the first one
        else:
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, expected) and torch.equal(full, expected)
        served = found.linear(path, CPU, torch.bfloat16)
        assert found.stored_bytes(path) == sum(tensor.nbytes for tensor in served.parameters())
    for name in sorted(found.others):
        assert torch.equal(found.other(name), whole[name])


def test_without_scales_values_are_the_weights(tmp_path: Path) -> None:
    tensors = {name: tensor.to(FP8) for name, tensor in weights().items()}
    found = checkpoint(tensors, tmp_path)
    assert found.label == "FP8 without scales"
    layer = found.linear(LAYER, CPU, torch.bfloat16)
    assert isinstance(layer, Fp8Linear) and layer.scales.eq(1).all()
    assert torch.equal(layer.bias, tensors[f"{LAYER}.bias"].bfloat16())
    assert torch.equal(found.full(MODULATION, CPU)[0], tensors[f"{MODULATION}.weight"].float())


def test_on_meta_it_is_the_same_layer_without_numbers(tmp_path: Path) -> None:
    found = checkpoint(quantised(weights()), tmp_path)
    for path in found.linears:
        layer, empty = (found.linear(path, device, torch.bfloat16) for device in (CPU, META))
        assert type(layer) is type(empty)
        for (name, tensor), (other, place) in zip(
            layer.named_parameters(), empty.named_parameters(), strict=True
        ):
            assert (name, tensor.shape, tensor.dtype) == (other, place.shape, place.dtype)
            assert place.is_meta


def note(form: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def changed(**change: Tensor | None) -> dict[str, Tensor]:
    tensors = quantised(weights()) | {
        name.replace("__", "."): tensor for name, tensor in change.items() if tensor is not None
    }
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
    return tensors


BLOCK = "transformer_blocks__3__attn__to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{BLOCK}__weight": None}, f"{LAYER}.weight is missing"),
        ({f"{BLOCK}__bias": None}, f"{LAYER}.bias is missing"),
        ({f"{BLOCK}__weight": torch.zeros(64, 128).to(FP8)}, r"is \(64, 128\), expected \(128"),
        ({f"{BLOCK}__weight": torch.zeros(128, 128, dtype=torch.int8)}, "is in torch.int8"),
        ({f"{BLOCK}__weight": torch.zeros(128, 128).to(torch.float8_e5m2)}, "float8_e5m2"),
        ({f"{BLOCK}__scale_weight": torch.ones(5)}, "has 5 scales"),
        ({f"{BLOCK}__weight_scale": torch.ones(1)}, f"{LAYER} has scales under two names"),
        ({f"{BLOCK}__lora_down": torch.ones(5)}, "lora_down is not known"),
        ({f"{BLOCK}__comfy_quant": note("nvfp4")}, "comfy_quant is not known"),
        ({"proj_out__weight_scale": torch.ones(1)}, "proj_out.weight_scale is not known"),
        ({ZERO_COND_T: torch.zeros(1)}, "zero_cond_t"),
    ],
)
def test_what_is_not_understood_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = changed(**change) if ZERO_COND_T not in change else quantised(weights()) | change
    with pytest.raises(ModelMismatch, match=message):
        checkpoint(tensors, tmp_path)


def test_the_mark_of_zero_cond_t_fits_its_model(tmp_path: Path) -> None:
    tensors = quantised(weights()) | {ZERO_COND_T: torch.zeros(1)}
    save_file(tensors, tmp_path / "file.safetensors")
    config = dataclasses.replace(CONFIG, zero_cond_t=True)
    assert open_checkpoint(tmp_path / "file.safetensors", config).label.startswith("FP8")


def test_a_layers_own_note_of_its_format_is_read(tmp_path: Path) -> None:
    tensors = changed(**{f"{BLOCK}__comfy_quant": note("float8_e4m3fn")})
    assert checkpoint(tensors, tmp_path).label == "FP8 with a scale for each weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_found(value: float, tmp_path: Path) -> None:
    found = checkpoint(changed(**{f"{BLOCK}__scale_weight": torch.tensor(value)}), tmp_path)
    for read in (lambda: found.linear(LAYER, CPU, torch.bfloat16), lambda: found.full(LAYER, CPU)):
        with pytest.raises(ModelMismatch, match="is no scale"):
            read()


def test_values_that_are_none_are_found(tmp_path: Path) -> None:
    broken = torch.zeros(128, 128)
    broken[5, 7] = float("nan")
    found = checkpoint(changed(**{f"{BLOCK}__weight": broken.to(FP8)}), tmp_path)
    for read in (lambda: found.linear(LAYER, CPU, torch.bfloat16), lambda: found.full(LAYER, CPU)):
        with pytest.raises(ModelMismatch, match="no numbers"):
            read()
