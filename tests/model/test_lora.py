"""LoRA files: every format is understood whole, or refused; merged as peft and diffusers merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.components import TRANSFORMER
from image_worker.model.lora import Lora
from tests import upstream
from tests.conftest import MINI, MINI_FOLDER, build_mini, read_mini

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


def test_scales_in_metadata_are_not_ignored(tmp_path: Path) -> None:
    path = tmp_path / "peft.safetensors"
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 32}'}
    save_file(pair("to_q", "lora_A", "lora_B"), path, metadata)
    with pytest.raises(ModelMismatch, match="metadata"):
        Lora.read(path)


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
