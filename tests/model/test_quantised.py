"""Weights in few bits on the CPU: against bitsandbytes, their pictures, their bytes, the LoRA."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from image_worker.bench.stock_nf4 import quant_state
from image_worker.edit import conditions
from image_worker.edit.decode import decode
from image_worker.edit.denoise import denoise, start
from image_worker.errors import ModelMismatch
from image_worker.kernels.reference import decode_nf4
from image_worker.model.components import TEXT_ENCODER, TRANSFORMER, Component
from image_worker.model.formats import format_of, nf4
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.formats.svdq import SvdqWeight
from image_worker.model.lora import Lora
from tests.conftest import MINI, MINI_FOLDER, build_mini, make_picture, mini_model, read_mini
from tests.pictures import psnr

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(layer: Any) -> Tensor:
    """The weight that a quantised layer stands for, float32."""
    if isinstance(layer, CodedLinear) and isinstance(layer.weight, SvdqWeight):
        found = torch.empty(layer.weight.shape)
        layer.weight.decode(found)
        return found
    if isinstance(layer, CodedLinear):
        return decoded(layer, torch.float32)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.state.CB.float() * layer.state.SCB[:, None] / 127
    if isinstance(layer, Fp8Linear):
        return layer.weight.float() * layer.scales
    assert isinstance(layer, nn.Linear)
    return layer.weight.float()


def decoded(layer: CodedLinear, dtype: torch.dtype) -> Tensor:
    """NF4, by bitsandbytes."""
    state = quant_state(layer.weight, dtype)
    return bnb.functional.dequantize_4bit(  # type: ignore[no-any-return]
        layer.weight.codes.view(-1, 1), state
    )


@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "svdq", "4bit"])
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
    ("precision", "kind"), [("fp8", "Fp8Linear"), ("8bit", "Linear8bitLt"), ("4bit", "CodedLinear")]
)
def test_what_is_quantised(precision: str, kind: str) -> None:
    transformer = read_mini(TRANSFORMER, torch.bfloat16, precision)
    text_encoder = read_mini(TEXT_ENCODER, torch.bfloat16, precision)
    linear = {
        name: type(module).__name__
        for name, module in transformer.named_modules()
        if isinstance(module, (nn.Linear, Fp8Linear, CodedLinear))
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
    assert type(layer).__name__ == "CodedLinear"


@pytest.mark.parametrize(
    ("precision", "least"), [("fp8", 30.0), ("8bit", 30.0), ("svdq", 28.0), ("4bit", 20.0)]
)
def test_the_picture_stays_near_bf16s(precision: str, least: float) -> None:
    assert psnr(edit_in(precision), edit_in("bf16")) >= least


@functools.cache
def edit_in(precision: str) -> Image.Image:
    model = mini_model(torch.bfloat16, precision_mode=precision)
    encoded = conditions.encode(model, "make it blue", None, [make_picture()])
    picture = start(model, encoded, (128, 128), seed=1, steps=8, cfg_scale=1.0)
    denoise(model, [picture])
    return decode(model, picture)


def test_the_picture_stays_near_with_attention_in_int8() -> None:
    def edit(attention: str) -> Any:
        model = mini_model(torch.bfloat16, attention=attention)
        encoded = conditions.encode(model, "make it blue", None, [make_picture()])
        pictures = [
            start(model, encoded, size, seed=1, steps=4, cfg_scale=1.0)
            for size in ((128, 128), (48, 96))  # two rows of one batch, of two lengths
        ]
        denoise(model, pictures)
        return [decode(model, picture) for picture in pictures]

    for found, exact in zip(edit("int8"), edit("bf16"), strict=True):
        assert 25 <= psnr(found, exact) < 100


def test_int8_has_llm_int8s_threshold() -> None:
    form = format_of("8bit")
    assert form is not None
    layer: Any = form.encode(torch.randn(64, 64).bfloat16(), False, torch.float16)
    assert layer.state.threshold == 6.0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(96, 128), (1030, 64), (8, 3072)])
def test_nf4_is_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours: Any = nf4.encode(weight.clone(), False, dtype)
    theirs = bnb.nn.LinearNF4(columns, rows, bias=False, compute_dtype=dtype).to(dtype)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    theirs.support_avx512bf16_for_cpu = False  # it would multiply in another order
    state = theirs.weight.quant_state
    assert torch.equal(ours.weight.codes.view(-1, 1), theirs.weight.data)
    assert torch.equal(ours.weight.scales.flatten(), state.absmax)
    assert torch.equal(decoded(ours, dtype), bnb.functional.dequantize_4bit(theirs.weight, state))
    x = torch.randn(2, 5, columns).to(dtype)
    found = ours(x)
    assert found.dtype == dtype
    assert torch.equal(found, theirs(x))


@pytest.mark.parametrize("component", [TEXT_ENCODER, TRANSFORMER], ids=lambda one: one.name)
def test_every_layer_of_the_miniature_decodes_to_bitsandbytes_bits(component: Component) -> None:
    module = read_mini(component, torch.bfloat16, "4bit")
    layers = [layer for layer in module.modules() if isinstance(layer, CodedLinear)]
    assert len(layers) == {"text_encoder": 3 * 7, "transformer": 7 * 12}[component.name]
    for layer in layers:
        for dtype in TYPES:
            found = torch.empty(layer.weight.shape, dtype=dtype)
            decode_nf4(layer.weight, found)
            assert torch.equal(found, decoded(layer, dtype))


def test_rows_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(ModelMismatch, match="multiple of 64 weights, not of 96"):
        nf4.encode(torch.randn(64, 96), False, torch.float32)


@pytest.mark.parametrize("precision", ["fp8", "8bit", "svdq", "4bit"])
def test_the_forecast_of_a_layers_bytes_is_right(precision: Any) -> None:
    from image_worker.model.packed import slots

    form = format_of(precision)
    assert form is not None
    layer = form.encode(torch.randn(1024, 512).bfloat16(), False, torch.bfloat16)
    unique = {slot.tensor.data_ptr(): slot.tensor.nbytes for slot in slots(layer)}
    # Beside the weights, NF4 keeps two tables of code values, 1 KiB and less.
    assert 0 <= sum(unique.values()) - form.size(1024, 512) <= 1200
