"""LoRA files: every format is understood whole, or refused; merged as peft and diffusers merge."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model import lora_format
from image_worker.model.components import TRANSFORMER
from image_worker.model.lora import Lora
from image_worker.model.skeleton import Skeleton
from tests import upstream
from tests.conftest import MINI, MINI_FOLDER, build_mini, mini_model, read_mini

LIGHTNING = MINI_FOLDER / MINI.lightning[8].path


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "some-lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def pair(module: str, down: str, up: str, alpha: float | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        f"{module}.{down}.weight": torch.randn(4, 16),
        f"{module}.{up}.weight": torch.randn(8, 4),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"to_q": nn.Linear(16, 8), "norm": nn.LayerNorm(8)})


@pytest.mark.parametrize(
    ("tensors", "scale"),
    [
        (pair("block.to_q", "lora_down", "lora_up", 2.0), 0.5),
        (pair("block.to_q", "lora_down", "lora_up"), 1.0),
        (pair("block.to_q", "lora_A", "lora_B"), 1.0),
        (pair("transformer.block.to_q", "lora_A", "lora_B"), 1.0),
        (pair("diffusion_model.block.to_q", "lora_A.default", "lora_B.default"), 1.0),
        (pair("model.diffusion_model.block.to_q", "lora_down", "lora_up", 2.0), 0.5),
        (pair("base_model.model.block.to_q", "lora_A", "lora_B"), 1.0),
        (pair("base_model.model.transformer.block.to_q", "lora_A.x", "lora_B.x"), 1.0),
        (pair("block.to_q", "lora.down", "lora.up"), 1.0),
        (pair("transformer.block.to_q", "lora_A", "lora_B", 8.0), 2.0),
    ],
)
def test_every_key_format_gives_the_same_change(
    tensors: dict[str, Tensor], scale: float, tmp_path: Path
) -> None:
    lora = Lora.read(write(tmp_path, tensors))
    lora.check_fits(Net())
    weight = torch.randn(8, 16)
    down, up = (tensor for tensor in tensors.values() if tensor.ndim == 2)
    assert torch.allclose(lora.merge("block.to_q", weight), weight + scale * up @ down, atol=1e-5)
    assert lora.merge("block.other", weight) is weight
    lora.check_merged()


def test_merged_weights_are_those_of_diffusers() -> None:
    pipeline = upstream.edit_plus_pipeline(MINI_FOLDER, torch.float32, lora=LIGHTNING)
    expected = pipeline.transformer.state_dict()
    found = read_mini(TRANSFORMER, torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_the_published_format_names_twelve_modules_a_block() -> None:
    assert len(Lora.read(LIGHTNING).pairs) == 12 * 7
    assert all(pair.scale == 1.0 for pair in Lora.read(LIGHTNING).pairs.values())


def layers() -> dict[str, nn.Linear]:
    config = mini_model().transformer.config
    with torch.device("meta"):
        skeleton = Skeleton(config)
    return {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}


def test_every_linear_layer_of_the_model_is_known_by_its_name() -> None:
    blocks = {f"transformer_blocks.{n}.{name}" for n in range(7) for name in lora_format.IN_BLOCK}
    assert blocks | set(lora_format.OUTSIDE) == set(layers())


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_names_with_underscores_are_the_models(prefix: str) -> None:
    for name in layers():
        flat = prefix + name.replace(".", "_")
        assert lora_format.parse(f"{flat}.lora_down.weight") == (name, "down")
        assert lora_format.parse(f"{flat}.alpha") == (name, "alpha")


def test_kohyas_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_qwen_lora_to_diffusers as convert,
    )

    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers().items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = torch.randn(2, layer.in_features)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(layer.out_features, 2)
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    found = Lora.read(write(tmp_path, tensors)).pairs
    expected = convert(dict(tensors))
    assert {f"transformer.{name}.lora_A.weight" for name in found} == {
        name for name in expected if "lora_A" in name
    }
    for name, change in found.items():
        down, up = (expected[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(change.up @ change.down * change.scale, up @ down)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("block.to_q.hada_w1_a", "LoHa"),
        ("lora_unet_block_to_q.lokr_w1", "LoKr"),
        ("block.to_q.dora_scale", "DoRA"),
        ("base_model.model.block.to_q.lora_magnitude_vector.default.weight", "DoRA"),
        ("block.to_q.diff_b", "biases"),
        ("block.to_q.lora_B.bias", "biases"),
        ("block.to_q.oft_blocks", "OFT"),
    ],
)
def test_other_kinds_are_refused_by_name(key: str, kind: str, tmp_path: Path) -> None:
    tensors = pair("block.to_q", "lora_down", "lora_up") | {key: torch.zeros(2)}
    with pytest.raises(ModelMismatch, match=rf"1 of 3 tensors .*{kind}.*{re.escape(key)}"):
        Lora.read(write(tmp_path, tensors))


def raw(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**23) + b" " * 100,
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x04\x95" + b"\0" * 100,
        raw({"x.lora_A.weight": entry([2**32, 2**32], 0)}, b""),
        raw({"x.lora_A.weight": entry([10**30], 4)}, b"\0" * 4),
        raw({"x.lora_A.weight": entry([1, 2**40], 4)}, b"\0" * 4),
        raw({"__metadata__": [], "x.lora_A.weight": entry([1], 4)}, b"\0" * 4),
        raw({"x.lora_A.weight": [[]]}, b""),
    ],
)
def test_hostile_files_are_refused_at_no_cost(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelMismatch, match="not a readable safetensors file"):
        Lora.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    tensors = pair("block.to_q", "lora_A", "lora_B")
    tensors["block.to_q.lora_B.weight"][1, 2] = value
    with pytest.raises(ModelMismatch, match="no numbers"):
        Lora.read(write(tmp_path, tensors))


def test_integers_and_a_rank_above_the_layers_are_refused(tmp_path: Path) -> None:
    tensors = pair("block.to_q", "lora_A", "lora_B")
    integers = {name: tensor.int() for name, tensor in tensors.items()}
    with pytest.raises(ModelMismatch, match="floating-point"):
        Lora.read(write(tmp_path, integers))
    tensors = {
        "block.to_q.lora_A.weight": torch.zeros(17, 16),
        "block.to_q.lora_B.weight": torch.zeros(8, 17),
    }
    with pytest.raises(ModelMismatch, match="rank 17"):
        Lora.read(write(tmp_path, tensors)).check_fits(Net())


def test_a_file_with_other_tensors_is_refused(tmp_path: Path) -> None:
    tensors = pair("block.to_q", "lora_down", "lora_up") | {"block.to_q.diff": torch.zeros(2)}
    with pytest.raises(ModelMismatch, match=r"1 of 3 tensors .*block\.to_q\.diff"):
        Lora.read(write(tmp_path, tensors))


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="has only down"):
        Lora.read(write(tmp_path, {"block.to_q.lora_down.weight": torch.zeros(4, 16)}))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", LIGHTNING.read_bytes()[:5000]])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelMismatch, match="not a readable safetensors file"):
        Lora.read(path)


def test_a_module_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    both = pair("to_q", "lora_A", "lora_B") | pair("transformer.to_q", "lora_A", "lora_B")
    with pytest.raises(ModelMismatch, match="named twice"):
        Lora.read(write(tmp_path, both))


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0)])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    tensors = pair("to_q", "lora_A", "lora_B") | {"to_q.alpha": alpha}
    with pytest.raises(ModelMismatch, match="alpha"):
        Lora.read(write(tmp_path, tensors))


def with_metadata(folder: Path, **config: object) -> Path:
    path = folder / "peft.safetensors"
    named = {f"transformer.{name}": value for name, value in config.items()}
    save_file(
        pair("block.to_q", "lora_A", "lora_B"), path, {"lora_adapter_metadata": json.dumps(named)}
    )
    return path


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 32}, 8.0),
        ({"lora_alpha": 32, "use_rslora": True}, 16.0),
        ({"lora_alpha": 32, "alpha_pattern": {"to_q": 2.0}}, 0.5),
        ({"lora_alpha": 32, "alpha_pattern": {"block.to_q": 2.0}}, 0.5),
        ({"lora_alpha": 32, "alpha_pattern": {"q": 2.0}}, 8.0),
    ],
)
def test_scales_are_found_in_diffusers_metadata(
    config: dict[str, object], scale: float, tmp_path: Path
) -> None:
    assert Lora.read(with_metadata(tmp_path, **config)).pairs["block.to_q"].scale == scale


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "x"},
        {"r": 4},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 4, "use_dora": True},
        {"lora_alpha": 4, "bias": "all"},
        {"lora_alpha": 4, "alpha_pattern": {"(a+)+b": 1}},
        {"lora_alpha": 4, "alpha_pattern": [1]},
    ],
)
def test_metadata_that_is_not_understood_is_refused(
    config: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ModelMismatch, match=r"peft\.safetensors: it"):
        Lora.read(with_metadata(tmp_path, **config))


def test_a_file_without_any_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch):
        Lora.read(write(tmp_path, {}))


@pytest.mark.parametrize(
    ("module", "complaint"),
    [("block.to_k", "no linear layer"), ("block.norm", "no linear layer")],
)
def test_a_module_that_the_model_has_not_is_refused(
    module: str, complaint: str, tmp_path: Path
) -> None:
    lora = Lora.read(write(tmp_path, pair(module, "lora_A", "lora_B")))
    with pytest.raises(ModelMismatch, match=complaint):
        lora.check_fits(Net())


def test_another_models_widths_are_refused(tmp_path: Path) -> None:
    tensors = {
        "block.to_q.lora_A.weight": torch.zeros(4, 32),
        "block.to_q.lora_B.weight": torch.zeros(8, 4),
    }
    with pytest.raises(ModelMismatch, match=r"\(8, 32\) in the file and \(8, 16\)"):
        Lora.read(write(tmp_path, tensors)).check_fits(Net())


def test_a_pair_left_over_is_an_error(tmp_path: Path) -> None:
    lora = Lora.read(write(tmp_path, pair("block.to_q", "lora_A", "lora_B")))
    with pytest.raises(ModelMismatch, match="1 of 1 modules were not merged"):
        lora.check_merged()


def test_a_damaged_lightning_file_stops_the_cold_start(tmp_path: Path) -> None:
    import dataclasses

    from image_worker.catalog import HubFile

    tensors = load_file(LIGHTNING)
    name = "transformer_blocks.3.attn.to_q"
    renamed = {
        key.replace(name, "transformer_blocks.33.attn.to_q"): t for key, t in tensors.items()
    }
    write(tmp_path, renamed)
    file = HubFile(str(tmp_path), "some-lora.safetensors")
    entry = dataclasses.replace(MINI, lightning={8: file})
    with pytest.raises(ModelMismatch, match="1 of 84 modules"):
        build_mini(torch.bfloat16, entry)
