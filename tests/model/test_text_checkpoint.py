"""`TEXT_ENCODER_CHECKPOINT`: the miniature's text encoder in one file, as ComfyUI writes them.

What its bytes stand for is computed here, with torch alone; ours must agree to the bit, and
transformers with these weights to 1e-5 of the result's length, as in `test_text_encoder`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from image_worker.errors import InvalidSettings, ModelMismatch, ModelUnavailable
from image_worker.model import build as build_module
from image_worker.model import components, files
from image_worker.model.components import TEXT_ENCODER
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.formats.scaled_fp8 import ScaledFp8
from image_worker.model.packed import slots
from image_worker.model.placement import Plan
from image_worker.model.recipe import Recipe, read_component
from image_worker.model.text_checkpoint import open_text_encoder
from image_worker.model.wide import Wide
from image_worker.settings import Precision, Settings
from tests import upstream
from tests.conftest import MINI, MINI_FOLDER, build_mini, mini_model
from tests.model.cached_model import COMMIT, REPO
from tests.model.test_opening import archive, steps
from tests.model.test_scaled_fp8 import note
from tests.model.test_stream import edit, passing
from tests.model.test_text_encoder import apart, grids_of, prompt, seen
from tests.pictures import psnr

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
FOLDER = MINI_FOLDER / "text_encoder"
LAYER = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, Tensor]


def weights() -> Tensors:
    """The miniature's, under the names in its file, which are the published ones, too."""
    return load_file(FOLDER / "model.safetensors")


def quantised(
    weight_scale: str = "scale_weight", input_scale: str = "scale_input", *, rows: bool = False
) -> Tensors:
    """As in ComfyUI's file: matrices of both networks in FP8, and an output layer in 16 bits."""
    found = {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name, tensor in weights().items():
        found[name] = tensor
        if tensor.ndim == 2 and "embed" not in name:
            wide = tensor.float()
            scale = (wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax()) / 448
            path = name.removesuffix(".weight")
            found[name] = (wide / scale).to(FP8)
            found[f"{path}.{weight_scale}"] = scale
            found[f"{path}.{input_scale}"] = torch.ones(())
    return found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}


def unscaled() -> Tensors:
    """Everything in FP8, norms and biases, too."""
    return {name: tensor.to(FP8) for name, tensor in weights().items()}


def decoded(tensors: Tensors) -> Tensors:
    """What such a file stands for, in float32."""
    found = {}
    for name in weights():
        path = name.removesuffix(".weight")
        scales = [tensors.get(f"{path}.{leaf}") for leaf in ("scale_weight", "weight_scale")]
        scale = next((scale for scale in scales if scale is not None), torch.ones(()))
        found[name] = tensors[name].float() * scale
    return found


def newer(name: str) -> str:
    """transformers' newer name for one of the above."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def ours(name: str) -> str:
    return newer(name).removeprefix("model.")


def saved(tensors: Tensors, folder: Path, name: str = "file.bin") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def read(path: Path | None, dtype: torch.dtype, precision: Precision = "bf16") -> Any:
    """The module that serves; None: of the miniature's own folder."""
    single = {"text_encoder": open_text_encoder(path, FOLDER)} if path else {}
    recipe = Recipe(Settings.from_env({}), MINI, MINI_FOLDER, (), CPU, dtype, checkpoints=single)
    return read_component(recipe, TEXT_ENCODER, precision).eval()


KINDS = {
    "ComfyUI's": (quantised(), lambda name: name),
    "the other spelling": (quantised("weight_scale", "input_scale"), newer),
    "rows, with a prefix": (
        quantised(rows=True),
        lambda name: f"text_encoders.qwen25_7b.transformer.{name}",
    ),
    "without scales": (unscaled(), lambda name: name),
}


@pytest.fixture(params=KINDS)
def kind(request: Any, tmp_path: Path) -> tuple[Tensors, Path]:
    """A file's tensors, under the names of the miniature's, and the file."""
    tensors, rename = KINDS[request.param]
    return tensors, saved({rename(name): tensor for name, tensor in tensors.items()}, tmp_path)


def test_values_and_scales_are_the_files(kind: tuple[Tensors, Path]) -> None:
    tensors, path = kind
    expected = {ours(name): tensor for name, tensor in decoded(tensors).items()}
    stored = {ours(name): tensor for name, tensor in tensors.items()}
    found = open_text_encoder(path, FOLDER)
    assert isinstance(found, ScaledFp8) and found.label.startswith("FP8 with")
    assert len(found.linears) == 7 * 3 and all(".layers." in layer for layer in found.linears)
    for layer in sorted(found.linears):
        linear: Any = found.linear(layer, CPU, torch.float32)
        assert isinstance(linear, Fp8Linear)
        assert same_bytes(linear.weight, stored[f"{layer}.weight"])
        assert torch.equal(linear.weight.float() * linear.scales, expected[f"{layer}.weight"])
        has_bias = layer.endswith(("q_proj", "k_proj", "v_proj"))
        assert (linear.bias is not None) == has_bias
        assert not has_bias or torch.equal(linear.bias, expected[f"{layer}.bias"])
        served = found.linear(layer, CPU, torch.bfloat16)
        assert found.stored_bytes(layer) == sum(tensor.nbytes for tensor in served.parameters())
    for name in sorted(found.others):
        assert torch.equal(found.other(name).float(), expected[name]), "widened, to the bit"
    of_linears = {name for name in expected if name.rpartition(".")[0] in found.linears}
    assert found.others | of_linears == expected.keys()


def same_bytes(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_and_pictures_are_encoded_as_by_the_weights_it_stands_for(
    kind: tuple[Tensors, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors, path = kind
    wide = {name: tensor.to(dtype) for name, tensor in decoded(tensors).items()}
    found, expected = read(path, dtype), read(saved(wide, tmp_path, "wide.bin"), dtype)
    theirs, original = upstream.text_encoder(dtype), read(None, dtype)
    theirs.load_state_dict({ours(name): tensor for name, tensor in wide.items()})
    for sizes in ([], [(4, 4)], [(3, 5), (2, 2)]):
        ids, patches, grids = prompt("mini", sizes), seen("mini", sizes), grids_of("mini", sizes)
        hidden = found(ids, patches, grids)
        assert torch.equal(hidden, expected(ids, patches, grids))
        # Of pictures transformers' sums are in another order.
        if not sizes and dtype == torch.float32:
            told = theirs(ids[None], attention_mask=torch.ones_like(ids)[None])
            assert apart(hidden, told.last_hidden_state[0]) < 1e-5
        assert 0.005 < apart(hidden, original(ids, patches, grids)) < 0.2, "as FP8 rounds"


def test_a_file_in_16_bits_is_stored_as_settings_say(tmp_path: Path) -> None:
    half = {f"text_encoder.{newer(name)}": tensor for name, tensor in weights().items()}
    path = saved(half | {"lm_head.weight": torch.ones(2, 2)}, tmp_path)
    assert isinstance(open_text_encoder(path, FOLDER), Wide)
    for precision in ("bf16", "4bit"):
        pair = [dict(read(one, torch.bfloat16, precision).state_dict()) for one in (path, None)]
        assert pair[0].keys() == pair[1].keys()
        assert all(
            same_bytes(pair[0][name], pair[1][name]) for name in pair[0] if pair[0][name].ndim
        )


def test_sizes_are_those_of_what_serves(tmp_path: Path) -> None:
    path = saved(quantised(), tmp_path)
    settings = Settings.from_env({})
    found = components.sizes(
        MINI_FOLDER,
        settings,
        torch.bfloat16,
        checkpoints={"text_encoder": open_text_encoder(path, FOLDER)},
    )
    module = read(path, torch.bfloat16)
    layers = [
        sum(slot.tensor.nbytes for slot in slots(layer)) for layer in module.language_model.layers
    ]
    for precision, sizes in found.items():
        assert sizes.blocks["text_encoder/language_model.layers"] == layers, precision


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's folder, but for its text encoder's weights."""
    folder = tmp_path_factory.mktemp("model") / "mini"
    shutil.copytree(MINI_FOLDER, folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    return folder


def test_it_edits_is_prepared_and_streamed(
    without_weights: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    tensors = quantised()
    path, wide = saved(tensors, tmp_path), saved(decoded(tensors), tmp_path, "wide.bin")
    bf16 = {"precision_mode": "bf16", "model_id": str(without_weights)}
    expected = edit(build_mini(text_encoder_checkpoint=str(wide), **bf16))
    given = {"text_encoder_checkpoint": str(path), "model_dir": str(tmp_path), **bf16}
    kept = given | {"keep_prepared": "1"}
    with caplog.at_level(logging.INFO):
        first = build_mini(**kept)
    assert "text encoder: file.bin, FP8 with a scale for each weight" in caplog.text
    assert first.weights == "bf16" and "prepare" in steps(first)
    assert torch.equal(edit(first), expected)
    stock = edit(mini_model(precision_mode="bf16"))
    pictures = [Image.fromarray(pixels.numpy()) for pixels in (expected, stock)]
    assert 25 < psnr(*pictures) < 100, "another text encoder, of which the same picture comes"
    second = build_mini(**kept)
    streamed = passing(first, every=True)
    monkeypatch.setattr(build_module, "plan", lambda *_: Plan("bf16", streamed))
    for model in (second, build_mini(**kept)):
        assert "prepare" not in steps(model)
        assert torch.equal(edit(model), expected)
    monkeypatch.undo()
    tensors[f"{LAYER}.scale_weight"] *= 2
    saved(tensors, tmp_path)
    assert "prepare" in steps(build_mini(**kept)), "another file, another folder"


def test_the_models_own_weights_are_needed_without_it(
    without_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(without_weights, folder)
    given = {
        "model_id": REPO,
        "model_revision": COMMIT,
        "model_dir": str(tmp_path),
        "local_only": "1",
    }
    path = saved(weights(), tmp_path)
    with_it, without = (
        Settings.from_env({name.upper(): value for name, value in (given | more).items()})
        for more in ({"text_encoder_checkpoint": str(path)}, {})
    )
    assert files.find_model(MINI, with_it) == folder
    with pytest.raises(ModelUnavailable, match="text_encoder/ of the model is incomplete"):
        files.find_model(MINI, without)


def changed(**change: Tensor | None) -> Tensors:
    """The layer's tensors are other ones, or gone."""
    new = {f"{LAYER}.{leaf}": tensor for leaf, tensor in change.items()}
    return {name: tensor for name, tensor in (quantised() | new).items() if tensor is not None}


def wider() -> Tensors:
    """The same architecture, of another width."""
    return {
        name: torch.zeros([2 * size for size in tensor.shape]).to(tensor.dtype)
        for name, tensor in quantised().items()
    }


def named(*names: str) -> Tensors:
    return {name: torch.zeros(8, 8, dtype=torch.bfloat16) for name in names}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(weight=None), r"layers.1.self_attn.q_proj.weight is missing"),
        (changed(bias=None), r"q_proj.bias is missing"),
        (changed(weight=torch.zeros(64, 128).to(FP8)), r"is \(64, 128\), expected \(128, 128\)"),
        (changed(weight=torch.zeros(128, 128, dtype=torch.int8)), "is in torch.int8"),
        (changed(weight=torch.zeros(128, 128).to(torch.float8_e5m2)), "float8_e5m2"),
        (changed(scale_weight=torch.ones(5)), "has 5 scales"),
        (changed(weight_scale=torch.ones(1)), "has scales under two names"),
        (changed(lora_down=torch.ones(5)), f"{LAYER}.lora_down is not known"),
        (changed(comfy_quant=note("nvfp4")), "comfy_quant is not known"),
        (quantised() | named("model.diffusion_model.x"), "diffusion_model.x is not known"),
        (quantised() | {newer(f"{LAYER}.weight"): torch.ones(2)}, "q_proj.weight twice"),
        (wider(), r"input_layernorm.weight is \(256,\), expected \(128,\)"),
        (
            {name: tensor for name, tensor in quantised().items() if ".layers.2." not in name},
            r"12 faults, the first: language_model.layers.2",
        ),
        (
            {name: tensor for name, tensor in quantised().items() if "visual" not in name},
            "is a language model without a vision tower; expected Qwen2.5-VL",
        ),
        (named("encoder.block.0.layer.0.SelfAttention.q.weight"), "is a T5 encoder; expected"),
        (named("text_model.encoder.layers.0.mlp.fc1.weight"), "is a CLIP text encoder"),
        (named("transformer_blocks.0.attn.to_q.weight"), "is an image transformer"),
        (named("something"), "is no language model"),
        (
            weights() | {f"{LAYER}.weight": torch.zeros(128, 128, dtype=torch.int8)},
            "tensors in int8, in no format that is known here",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tensors: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match=message):
        open_text_encoder(saved(tensors, tmp_path), FOLDER)


@pytest.mark.parametrize("path", [LAYER, "visual.blocks.0.attn.qkv"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_found(value: float, path: str, tmp_path: Path) -> None:
    tensors = quantised() | {f"{path}.scale_weight": torch.tensor(value)}
    with pytest.raises(ModelMismatch, match=r"scale_weight of the checkpoint is no scale"):
        read(saved(tensors, tmp_path), torch.bfloat16)


@pytest.mark.parametrize("path", [LAYER, "visual.blocks.0.attn.qkv"])
def test_values_that_are_none_are_found(path: str, tmp_path: Path) -> None:
    tensors = quantised()
    tensors[f"{path}.weight"].view(torch.uint8)[3, 4] = 0x7F  # FP8's NaN
    with pytest.raises(ModelMismatch, match="weight of the checkpoint has values that are no"):
        read(saved(tensors, tmp_path), torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            weights() | {f"{LAYER}.weight": torch.zeros(64, 128)},
            r"is \(64, 128\) in the checkpoint",
        ),
        (weights() | {f"{LAYER}.extra": torch.zeros(1)}, "extra, which the model has not"),
        (
            {name: tensor for name, tensor in weights().items() if "model.norm" not in name},
            "lacks 1 tensors, the first: language_model.norm.weight",
        ),
    ],
)
def test_so_is_a_file_in_16_bits_that_does_not_fit(
    tensors: Tensors, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelMismatch, match=message):
        read(saved(tensors, tmp_path), torch.bfloat16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(), "is a zip archive, .* could run code"),
        (b"\x80\x04not a model", "is a pickle"),
        (b"GGUF\x03\0\0\0", "is a GGUF file; expected a safetensors file"),
        (b"", "is no safetensors file"),
        (b"\xff" * 64, "is no safetensors file"),
    ],
)
def test_what_holds_no_tensors_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "qwen.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelMismatch, match=message):
        open_text_encoder(path, FOLDER)


def test_what_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = saved(quantised(), tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelMismatch, match="is cut off"):
        open_text_encoder(path, FOLDER)


def test_settings_that_nothing_is_left_for_are_refused(tmp_path: Path) -> None:
    given = {"text_encoder_checkpoint": str(saved(quantised(), tmp_path)), "precision_mode": "4bit"}
    with pytest.raises(InvalidSettings, match="QUANTIZE_COMPONENTS=text has no meaning with a"):
        build_mini(quantize_components="text", **given)
    source = load_file(*(MINI_FOLDER / "transformer").glob("*.safetensors"))
    half = {name: tensor.to(FP8) for name, tensor in source.items()}
    both = {
        "checkpoint": str(saved(half, tmp_path, "other.bin")),
        "use_lightning_lora": "0",
    } | given
    with pytest.raises(
        InvalidSettings, match="PRECISION_MODE=4bit has no meaning where CHECKPOINT"
    ):
        build_mini(**both)
    assert build_mini(**both | {"precision_mode": "auto"}).weights == "FP8 without scales"
