"""4-bit and 8-bit weights on the CPU, through bitsandbytes: bytes, pictures, and the LoRA."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from image_worker.edit import conditions
from image_worker.edit.decode import decode
from image_worker.edit.denoise import denoise, start
from image_worker.model.build import Model
from image_worker.model.components import TEXT_ENCODER, TRANSFORMER
from image_worker.model.formats import FORMATS
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.lora import Lora
from tests.conftest import MINI, MINI_FOLDER, build_mini, make_picture, mini_model, read_mini
from tests.pictures import psnr


def stored(layer: Any) -> Tensor:
    """The weight that a quantised layer stands for, float32."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        return bnb.functional.dequantize_4bit(layer.weight.data, state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.state.CB.float() * layer.state.SCB[:, None] / 127
    if isinstance(layer, Fp8Linear):
        return layer.weight.float() * layer.scales
    assert isinstance(layer, nn.Linear)
    return layer.weight.float()


@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "4bit"])
def test_the_lora_survives(precision: str) -> None:
    """Merged before quantising: its projection on what quantised weights changed by is whole."""
    lora = Lora.read(MINI_FOLDER / MINI.lightning[8].path)
    found, base = (
        read_mini(TRANSFORMER, torch.bfloat16, precision, lora=flag) for flag in (True, False)
    )
    along, length = 0.0, 0.0
    for name, pair in lora.pairs.items():
        delta = pair.scale * (pair.up.float() @ pair.down.float())
        layers = (module.get_submodule(name) for module in (found, base))
        after, before = (stored(layer) for layer in layers)
        along += ((after - before) * delta).sum().item()
        length += (delta * delta).sum().item()
    assert len(lora.pairs) == 12 * 7
    # This LoRA was trained to be seen through NF4's rounding, so in NF4 it may be more than whole.
    assert 0.95 <= along / length <= (1.6 if precision == "4bit" else 1.05)


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp8", "Fp8Linear"), ("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")]
)
def test_what_is_quantised(precision: str, kind: str) -> None:
    transformer = read_mini(TRANSFORMER, torch.bfloat16, precision)
    text_encoder = read_mini(TEXT_ENCODER, torch.bfloat16, precision)
    linear = {
        name: type(module).__name__
        for name, module in transformer.named_modules()
        if isinstance(module, (nn.Linear, Fp8Linear))
    }
    in_blocks = {name for name in linear if name.startswith("transformer_blocks.")}
    modulation = {name for name in in_blocks if "_mod." in name}
    assert len(modulation) == 2 * 7 and len(in_blocks) == (2 + 12) * 7
    assert {linear[name] for name in in_blocks - modulation} == {kind}
    assert {linear[name] for name in linear if name not in in_blocks - modulation} == {"Linear"}
    assert type(text_encoder.language_model.layers[0].mlp.up_proj).__name__ == kind
    assert type(text_encoder.visual.blocks[0].mlp.up_proj).__name__ == "Linear"


def test_quantize_components_text_leaves_the_transformer_alone() -> None:
    model = build_mini(torch.bfloat16, precision_mode="4bit", quantize_components="text")
    assert type(model.transformer.blocks[1].qkv.image).__name__ == "Plain"
    layer = model.text_encoder.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"


@pytest.mark.parametrize(("precision", "least"), [("fp8", 30.0), ("8bit", 30.0), ("4bit", 20.0)])
def test_the_picture_stays_near_bf16s(precision: str, least: float) -> None:
    def edit(model: Model) -> Any:
        encoded = conditions.encode(model, "make it blue", None, [make_picture()])
        picture = start(model, encoded, (128, 128), seed=1, steps=8, cfg_scale=1.0)
        denoise(model, [picture])
        return decode(model, picture)

    exact = edit(mini_model(torch.bfloat16))
    assert psnr(edit(mini_model(torch.bfloat16, precision_mode=precision)), exact) >= least


def test_the_picture_stays_near_with_attention_in_int8() -> None:
    def edit(attention: str) -> Any:
        model = mini_model(torch.bfloat16, attention=attention)
        encoded = conditions.encode(model, "make it blue", None, [make_picture()])
        pictures = [
            start(model, encoded, size, seed=1, steps=4, cfg_scale=1.0)
            for size in ((128, 128), (96, 160))  # two rows of one batch, of two lengths
        ]
        denoise(model, pictures)
        return [decode(model, picture) for picture in pictures]

    for found, exact in zip(edit("int8"), edit("bf16"), strict=True):
        assert 25 <= psnr(found, exact) < 100


def test_layers_compute_as_told() -> None:
    weight = torch.randn(64, 64).bfloat16()
    nf4, int8 = (FORMATS[name] for name in ("4bit", "8bit"))  # type: ignore[index]
    assert nf4.encode(weight, False, torch.float16).compute_dtype == torch.float16
    assert int8.encode(weight, False, torch.float16).state.threshold == 6.0


def test_nf4_is_bitsandbytes_own() -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    form = FORMATS["4bit"]
    assert form is not None
    ours: Any = form.encode(weight.clone(), False, torch.bfloat16)
    theirs = bnb.nn.LinearNF4(128, 96, bias=False, compute_dtype=torch.bfloat16)
    theirs = theirs.to(torch.bfloat16)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    assert torch.equal(ours.weight.data, theirs.weight.data)
    assert torch.equal(stored(ours), stored(theirs))


@pytest.mark.parametrize("precision", ["fp8", "8bit", "4bit"])
def test_the_forecast_of_a_layers_bytes_is_right(precision: Any) -> None:
    from image_worker.model.packed import slots

    form = FORMATS[precision]
    assert form is not None
    layer = form.encode(torch.randn(1024, 512).bfloat16(), False, torch.bfloat16)
    unique = {slot.tensor.data_ptr(): slot.tensor.nbytes for slot in slots(layer)}
    # Beside the weights, NF4 keeps two tables of code values, 1 KiB and less.
    assert 0 <= sum(unique.values()) - form.size(1024, 512) <= 1200
