"""LoRAs beside the weights: what merged ones give, whatever format the weights have."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_worker.bench.ways import relative
from image_worker.compute import Compute
from image_worker.errors import ModelMismatch
from image_worker.kernels.reference import quantise
from image_worker.model import adapters, lora_format
from image_worker.model.adapters import PRODUCTS, Adapter
from image_worker.model.components import TRANSFORMER
from image_worker.model.lora import Lora, LoraPair
from image_worker.model.low_rank import Change, LowRank, Reads, RoundedChange, Scaled, Ups
from image_worker.model.transformer import ROUND_TO, Transformer, velocities
from image_worker.settings import Precision
from tests import upstream
from tests.conftest import MINI_FOLDER, mini_model, read_mini
from tests.model.rows import EXACT, ROWS
from tests.model.test_quantised import stored

CPU = torch.device("cpu")
BLOCKS = 2
STYLE = MINI_FOLDER / "loras" / "miniature-outlined-style-bf16.safetensors"
PATHS: list[tuple[Precision, Compute]] = [
    *(("bf16", "bf16"), ("fp8", "bf16"), ("8bit", "bf16"), ("4bit", "bf16")),
    *(("fp8", "fp8"), ("4bit", "fp8"), ("8bit", "int8"), ("4bit", "int8")),
]
IN_BLOCKS = [name for name in lora_format.IN_BLOCK if "_mod." not in name]
OF_TEXT = [name for name in IN_BLOCKS if "add" in name or "txt" in name]


@functools.cache
def source(precision: Precision) -> Any:
    found = read_mini(TRANSFORMER, torch.float32, precision)
    del found.transformer_blocks[BLOCKS:]
    return found


def served(source: Any, compute: Compute = "bf16") -> Transformer:
    copied = copy.deepcopy(source)
    return Transformer(copied, CPU, torch.float32, round_to=ROUND_TO[compute]).eval()


def made_up(names: Iterable[str], seed: int = 0, rank: int = 4) -> Lora:
    """A LoRA that changes these layers, those of blocks in every block."""
    generator = torch.Generator().manual_seed(seed)
    layers = dict(source("bf16").named_modules())
    pairs = {}
    for name in names:
        prefixes = [f"transformer_blocks.{n}." for n in range(BLOCKS)]
        for path in [name] if name in layers else [prefix + name for prefix in prefixes]:
            layer = layers[path]
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            pairs[path] = LoraPair(down * layer.in_features**-0.5, up * 0.1, 0.5)
    return Lora("made-up", pairs)


def adapter(*loras: Scaled) -> Adapter:
    reads: Reads = dict.fromkeys(PRODUCTS)
    return Adapter.of("key", loras, [reads] * BLOCKS, CPU, torch.float32)


def merged(source: Any, *loras: Scaled) -> Any:
    """The same weights, widened to float32, with the LoRAs added."""
    found = copy.deepcopy(source)
    for name, layer in list(found.named_modules()):
        if not hasattr(layer, "in_features"):
            continue
        weight = stored(layer)
        for lora, scale in loras:
            if name in lora.pairs:
                pair = lora.pairs[name]
                weight = weight + scale * pair.scale * pair.up.float() @ pair.down.float()
        wide = nn.Linear(layer.in_features, layer.out_features)
        wide.weight, wide.bias = nn.Parameter(weight), layer.bias
        found.set_submodule(name, wide)
    return found


def distances(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("precision", "compute"), PATHS)
def test_live_is_merged_whatever_the_weights_are_in(precision: Precision, compute: Compute) -> None:
    lora = made_up(IN_BLOCKS)
    live = served(source(precision), compute)
    plain = velocities(live, ROWS)
    made = Adapter.of("key", [(lora, 6.0)], live.reads, CPU, torch.float32)
    found = velocities(live, ROWS, made)
    expected = velocities(served(merged(source(precision), (lora, 6.0))), ROWS)
    without = velocities(served(merged(source(precision))), ROWS)
    rounding = distances(plain, without)  # of the products, without any LoRA
    assert distances(found, expected) < 2 * rounding + EXACT
    assert distances(without, expected) > 4 * distances(found, expected), "it does something"
    again = velocities(live, ROWS)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    "names",
    [
        ["attn.to_k"],
        ["attn.to_q", "attn.to_v", "attn.add_v_proj"],
        OF_TEXT,
        sorted(set(IN_BLOCKS) - set(OF_TEXT)),
        ["img_in", "txt_in", "proj_out"],
        ["img_mod.1", "txt_mod.1"],
        list(lora_format.OUTSIDE),
        [*lora_format.IN_BLOCK, *lora_format.OUTSIDE],
    ],
    ids=["k", "qvv", "text", "image", "ends", "mod", "outside", "all"],
)
def test_any_layer_may_be_changed(names: list[str]) -> None:
    lora = made_up(names)
    found = velocities(served(source("bf16")), ROWS, adapter((lora, 1.0)))
    expected = velocities(served(merged(source("bf16"), (lora, 1.0))), ROWS)
    assert distances(found, expected) < EXACT
    assert distances(velocities(served(source("bf16")), ROWS), expected) > 20 * EXACT


def test_several_loras_add_up_each_with_its_scale() -> None:
    every = [*lora_format.IN_BLOCK, *lora_format.OUTSIDE]
    loras = [(made_up(every, 1), 0.5), (made_up(IN_BLOCKS, 2, rank=3), -1.5), (made_up(OF_TEXT), 2)]
    found = velocities(served(source("bf16")), ROWS, adapter(*loras))
    expected = velocities(served(merged(source("bf16"), *loras)), ROWS)
    assert distances(found, expected) < EXACT


@torch.inference_mode()
def test_diffusers_live_loras_give_the_same() -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_qwen_lora_to_diffusers as convert,
    )
    from safetensors.torch import load_file

    base = read_mini(TRANSFORMER, torch.float32)
    theirs = upstream.transformer(copy.deepcopy(base))
    theirs.load_lora_adapter(convert(load_file(STYLE)), adapter_name="style")
    theirs.set_adapters(["style"], [0.7])
    ours = Adapter.of(
        "key", [(Lora.read(STYLE), 0.7)], [dict.fromkeys(PRODUCTS)] * 7, CPU, torch.float32
    )
    live = Transformer(base, CPU, torch.float32, round_to=None).eval()
    for given, found in zip(ROWS, velocities(live, ROWS, ours), strict=True):
        expected = upstream.velocity(theirs, given)
        assert relative(found, expected) < EXACT


@pytest.mark.parametrize(("round_to", "lost"), [(torch.float8_e4m3fn, 2e-3), (torch.int8, 1e-4)])
@pytest.mark.parametrize("streams", ["both", "image", "text"])
def test_rounded_inputs_are_read_as_what_they_stand_for(
    round_to: torch.dtype, lost: float, streams: str
) -> None:
    """`down` is rounded with them, to two numbers for each."""
    x, text_tokens = quantise(torch.randn(10, 16), round_to), 3
    image = LowRank(torch.randn(2, 16), Ups(((slice(4, 8), slice(0, 2), torch.randn(4, 2)),)))
    text = LowRank(torch.randn(11, 16), Ups(((slice(0, 8), slice(0, 11), torch.randn(8, 11)),)))
    change = Change(
        image if streams != "text" else None,
        text if streams != "image" else None,
    )
    found, expected = torch.zeros(10, 8), torch.zeros(10, 8)
    RoundedChange.of(change, round_to).add_to(found, x, text_tokens)
    change.add_to(expected, x.values.float() * x.scales, text_tokens)
    assert relative(found, expected) < lost
    assert not found[text_tokens:, :4].any(), "it is not added to other layers' outputs"


def test_tables_are_made_again_only_for_loras_that_change_them() -> None:
    live = served(source("bf16"))
    (plain,) = live.prepare([0.5])
    (same,) = live.prepare([0.5], adapter((made_up(IN_BLOCKS), 1.0)))
    assert same is plain
    changing = adapter((made_up(["img_mod.1"]), 1.0))
    (changed,) = live.prepare([0.5], changing)
    assert not torch.equal(changed, plain)
    assert live.prepare([0.5], changing)[0] is changed
    assert live.prepare([0.5])[0] is plain
    assert list(live.modulation.tables()) == [0.5], "what is written to disk is the model's own"


@pytest.mark.parametrize("names", [[*lora_format.IN_BLOCK, *lora_format.OUTSIDE], OF_TEXT])
@pytest.mark.parametrize("round_to", [None, torch.float8_e4m3fn, torch.int8])
def test_what_it_takes_is_known_before_it_is_made(
    names: list[str], round_to: torch.dtype | None
) -> None:
    loras = [(made_up(names, rank=20), 1.0), (made_up(OF_TEXT), 2.0)]
    reads: list[Reads] = [dict.fromkeys(PRODUCTS, round_to)] * BLOCKS
    made = Adapter.of("key", loras, reads, CPU, torch.bfloat16)
    scales = sum(
        change.scales.nbytes + change.zeros.nbytes
        for block in made.blocks
        for change in vars(block).values()
        if isinstance(change, RoundedChange)
    )
    forecast = adapters.card_bytes(loras, torch.bfloat16)
    assert made.nbytes - scales <= forecast
    if round_to is not None:
        assert made.nbytes - scales == forecast
        assert scales < 0.1 * forecast, "of narrow layers; of 3072 columns they are 3 in 1000"


def test_values_that_the_type_cannot_hold_are_refused() -> None:
    lora = made_up(["attn.to_q"])
    with pytest.raises(ModelMismatch, match="too large"):
        Adapter.of("key", [(lora, 1e6)], [dict.fromkeys(PRODUCTS)], CPU, torch.float16)


def test_a_lora_of_another_model_is_refused() -> None:
    adapters.check(Lora.read(STYLE), mini_model().transformer.config)
    pairs = {"transformer_blocks.7.attn.to_q": LoraPair(torch.ones(1, 128), torch.ones(128, 1), 1)}
    with pytest.raises(ModelMismatch, match=r"transformer_blocks\.7\.attn\.to_q is no"):
        adapters.check(Lora("other", pairs), mini_model().transformer.config)
