"""`CHECKPOINT`: recognised by what is in it, served as its format says, or refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from image_worker.catalog import LIGHTNING_SAMPLER
from image_worker.errors import ModelMismatch, ModelUnavailable
from image_worker.kernels import reference
from image_worker.model import build as build_module
from image_worker.model.build import Model
from image_worker.model.components import is_modulation
from image_worker.model.opening import open_checkpoint
from image_worker.model.placement import Plan
from image_worker.model.wide import Wide
from tests.conftest import MINI, MINI_FOLDER, build_mini
from tests.model.test_scaled_fp8 import CONFIG, weights
from tests.model.test_stream import edit, passing
from tests.pictures import psnr
from tools import ggml

NO_LORA = {"use_lightning_lora": "0"}


def rowwise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The blocks' weights as `PRECISION_MODE=fp8` has them."""
    found = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if tensor.ndim == 2 and name.startswith("transformer_blocks.") and not is_modulation(path):
            made = reference.quantise(tensor, reference.FP8)
            found[name], found[f"{path}.weight_scale"] = made.values, made.scales
        else:
            found[name] = tensor
    return found


@pytest.fixture
def base() -> dict[str, Tensor]:
    """The miniature's weights without Lightning."""
    from image_worker.model.components import TRANSFORMER
    from tests.conftest import read_mini

    source = read_mini(TRANSFORMER, torch.bfloat16, lora=False)
    return {name: tensor.detach().contiguous() for name, tensor in source.named_parameters()}


def saved(tensors: dict[str, Tensor], folder: Path, prefix: str = "") -> str:
    path = folder / "file.bin"  # its name says nothing
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return str(path)


def steps(model: Model) -> list[str]:
    return [step.name for step in model.cold_start.steps]


def test_fp8_of_our_own_kind_makes_the_same_picture(base: Any, tmp_path: Path) -> None:
    path = saved(rowwise(base), tmp_path, "model.diffusion_model.")
    expected = edit(build_mini(precision_mode="fp8", **NO_LORA))
    model = build_mini(precision_mode="fp8", checkpoint=path, **NO_LORA)
    assert torch.equal(edit(model), expected)
    assert model.lightning_steps is None


def test_weights_in_16_bits_are_stored_as_settings_say(base: Any, tmp_path: Path) -> None:
    path = saved(base, tmp_path, "diffusion_model.")
    for settings in ({"precision_mode": "4bit"}, {"precision_mode": "bf16", **NO_LORA}):
        assert torch.equal(
            edit(build_mini(checkpoint=path, **settings)), edit(build_mini(**settings))
        )


def test_it_is_prepared_and_streamed_like_any_other(
    base: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = saved(rowwise(base), tmp_path)
    settings = {"precision_mode": "4bit", "checkpoint": path, **NO_LORA}
    stays = build_mini(**settings)
    expected = edit(stays)
    kept = {"model_dir": str(tmp_path), "keep_prepared": "1"}
    for plan, made in ((None, True), (None, False), (passing(stays, every=True), False)):
        if plan:
            monkeypatch.setattr(build_module, "plan", lambda *_: Plan("4bit", plan))  # noqa: B023
        model = build_mini(**settings, **kept)
        assert ("prepare" in steps(model)) == made
        assert torch.equal(edit(model), expected)
    monkeypatch.undo()
    other = {
        name: tensor * 2 if name == "proj_out.bias" else tensor for name, tensor in base.items()
    }
    saved(rowwise(other), tmp_path)
    assert "prepare" in steps(build_mini(**settings, **kept)), "another file, another folder"


def test_lightning_that_is_merged_is_not_merged_again(tmp_path: Path) -> None:
    path = saved(rowwise(weights()), tmp_path)  # with Lightning for 8 steps
    bf16 = torch.bfloat16  # to which the merged weights were rounded before they were quantised
    model = build_mini(bf16, checkpoint=path, checkpoint_lightning="8", precision_mode="fp8")
    assert (model.lightning_steps, model.sampler) == (8, LIGHTNING_SAMPLER)
    assert model.transformer.beside is None
    assert torch.equal(edit(model), edit(build_mini(bf16, precision_mode="fp8")))


def test_the_models_own_transformer_is_not_needed(base: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(MINI_FOLDER, folder)
    for shard in (folder / "transformer").glob("*.safetensors*"):
        shard.unlink()
    path = saved(rowwise(base), tmp_path)
    settings = {"precision_mode": "fp8", "model_id": str(folder), **NO_LORA}
    assert torch.equal(
        edit(build_mini(checkpoint=path, **settings)),
        edit(build_mini(**settings | {"model_id": str(MINI_FOLDER)})),
    )
    with pytest.raises(ModelUnavailable, match="transformer/ of the model is incomplete"):
        build_mini(**settings)


def archive() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as made:
        made.writestr("data.pkl", pickle.dumps({"weight": 1}))
    return memory.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(), "is a zip archive, .* could run code"),
        (pickle.dumps({"weight": 1}), "is a pickle"),
        (b"", "is no safetensors file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"not a model at all", "is no safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelMismatch, match=message):
        open_checkpoint(path, CONFIG)


def test_no_headers_length_is_taken_for_a_pickle(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for padding in range(0, 256, 8):
        save_file(base, path, {"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            assert isinstance(open_checkpoint(path, CONFIG), Wide)
            return
    pytest.fail("no header of such a length")


def test_types_that_are_not_known_are_named(base: Any, tmp_path: Path) -> None:
    tensors = base | {"proj_out.weight": base["proj_out.weight"].to(torch.int8)}
    with pytest.raises(ModelMismatch, match="tensors in int8, in no format that is known"):
        open_checkpoint(Path(saved(tensors, tmp_path)), CONFIG)


def test_another_models_weights_are_refused(base: Any, tmp_path: Path) -> None:
    half = {name: tensor[: len(tensor) // 2].contiguous() for name, tensor in base.items()}
    assert isinstance(open_checkpoint(Path(saved(half, tmp_path)), CONFIG), Wide)
    with pytest.raises(ModelMismatch, match="in the checkpoint"):
        build_mini(checkpoint=saved(half, tmp_path), **NO_LORA)
    assert MINI.name == "mini"


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_gguf_is_served_from_start_to_picture(
    base: Any, compute: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Against the weights that it stands for, in a file of 32 bits; prepared, and streamed."""
    path = tmp_path / "model.gguf"
    ggml.write(
        path,
        {
            name: (tensor.float().numpy(), "Q8_0" if tensor.ndim == 2 else "F32")
            for name, tensor in base.items()
        },
    )
    opened = open_checkpoint(path, CONFIG)
    assert not isinstance(opened, Wide)
    wide = {name: opened.other(name).float() for name in opened.others}
    for layer in opened.linears:
        wide[f"{layer}.weight"], wide[f"{layer}.bias"] = opened.full(layer, torch.device("cpu"))
    plain = saved({name: tensor.float().contiguous() for name, tensor in wide.items()}, tmp_path)
    expected = edit(build_mini(checkpoint=plain, precision_mode="bf16", **NO_LORA))
    settings = {
        "checkpoint": str(path),
        "precision_mode": "bf16",
        "compute": compute,
        "model_dir": str(tmp_path),
        "keep_prepared": "1",
    }
    first = build_mini(**settings, **NO_LORA)
    assert first.weights == "GGUF Q8_0"
    found = edit(first)
    pictures = [Image.fromarray(pixels.numpy()) for pixels in (found, expected)]
    assert psnr(*pictures) > (60 if compute == "bf16" else 25)
    streamed = passing(first, every=True)
    monkeypatch.setattr(build_module, "plan", lambda *_: Plan("bf16", streamed))
    second = build_mini(**settings, **NO_LORA)
    assert "prepare" not in steps(second)
    assert torch.equal(edit(second), found)
