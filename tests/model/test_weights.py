"""Streaming a checkpoint into a module: everything finds its place, or loading stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model import weights
from image_worker.model.components import text_encoder_name
from image_worker.model.formats import format_of
from image_worker.settings import Precision

PLAIN = weights.Storage(torch.float32)
CPU = torch.device("cpu")


def net() -> nn.Sequential:
    with init_empty_weights():
        return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4, bias=False))


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(
            nn.Sequential(
                nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4, bias=False)
            ).state_dict()
        )


def write(folder: Path, *shards: dict[str, Tensor]) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    return paths


def test_shards_in_any_order(tmp_path: Path) -> None:
    given = tensors()
    halves = [dict(list(given.items())[::-1][:2]), dict(list(given.items())[::-1][2:])]
    module = net()
    weights.load(module, weights.read(write(tmp_path, *halves)), PLAIN, CPU)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, given[name])
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("bias_first", [False, True])
def test_a_quantised_layer_gets_its_bias_before_or_after(bias_first: bool, tmp_path: Path) -> None:
    given = tensors()
    first, second = {"0.bias": given.pop("0.bias")}, given
    files = write(tmp_path, first, second)
    module = net()
    form = weights.Storage(torch.float32, lambda name: format_of("4bit") if name == "0" else None)
    weights.load(module, weights.read(files if bias_first else files[::-1]), form, CPU)
    assert type(module[0]).__name__ == "CodedLinear"
    assert torch.equal(module[0].bias, first["0.bias"])
    x = torch.randn(3, 64)
    exact = nn.functional.linear(x, given["0.weight"], first["0.bias"])
    assert (module[0](x) - exact).norm() / exact.norm() < 0.2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"3.weight": torch.zeros(1)}, "has 3.weight, which the model has not"),
        ({"0.weight": torch.zeros(32, 63)}, r"0.weight is \(32, 63\) .* \(32, 64\)"),
        ({"1.bias": None}, "lacks 1 tensors, the first: 1.bias"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor | None], complaint: str, tmp_path: Path
) -> None:
    given = {name: t for name, t in (tensors() | change).items() if t is not None}
    with pytest.raises(ModelMismatch, match=complaint):
        weights.load(net(), weights.read(write(tmp_path, given)), PLAIN, CPU)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "svdq", "4bit"])
def test_the_forecast_of_bytes(precision: Precision, tmp_path: Path) -> None:
    files = write(tmp_path, tensors())
    form = format_of(precision)
    storage = weights.Storage(torch.bfloat16, lambda name: form if name == "0" else None)
    others = 2 * (32 + 32 + 32 + 4 * 32)
    own = {
        "bf16": 2 * 64 * 32,
        "fp8": 64 * 32 + 4 * 32,
        "8bit": 64 * 32 + 4 * 32,
        "svdq": 32 * 32 + 2 * 32 + 2 * 32 * (32 + 64) + 4 * 64,
        "4bit": 32 * 32 + 32 + 4,
    }[precision]
    assert sum(weights.stored_bytes(weights.shapes(files), storage).values()) == others + own


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_a_file_that_is_cut_off_is_found_before_loading(cut: int, tmp_path: Path) -> None:
    [path] = write(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelMismatch, match="cut off"):
        weights.shapes([path])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("lm_head.weight", None),
    ],
)
def test_both_layouts_of_the_text_encoder(name: str, expected: str | None) -> None:
    assert text_encoder_name(name) == expected
