"""A transformer from a GGUF file: complete or refused, and computing as diffusers' module does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

from image_worker.bench.ways import relative
from image_worker.compute import Compute
from image_worker.errors import ModelMismatch
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.gguf_checkpoint import ZERO_COND, GgufCheckpoint
from image_worker.model.in_folder import read_json
from image_worker.model.shapes import expected
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from tests import upstream
from tests.conftest import MINI_FOLDER
from tests.model.rows import EXACT, ROWS, TOLERANCE
from tools import ggml

CPU, META = torch.device("cpu"), torch.device("meta")
FOLDER = MINI_FOLDER / "transformer"
MINI_CONFIG = TransformerConfig.parse(read_json(FOLDER / "config.json"))
# As small as a model can be with heads of 128.
TINY = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=128,
    joint_attention_dim=64,
    in_channels=32,
    axes_dims_rope=(16, 56, 56),
    zero_cond_t=False,
)
# As in a file that is called Q4_K_M: what a layer is asked to be, by the end of its path.
WANTED = {
    "img_mlp.net.2": "Q4_K",
    "txt_mlp.net.2": "Q6_K",
    "proj": "Q4_0",
    "to_v": "Q6_K",
    "add_v_proj": "Q6_K",
    "to_out.0": "Q5_1",
    "to_add_out": "Q5_1",
    "_mod.1": "Q8_0",
}
PLAIN = (
    "transformer_blocks.0.attn.to_out.0",
    *(f"transformer_blocks.1.{part}" for part in ("attn", "img_mlp", "txt_mlp")),
    "img_in",
    "proj_out",
)
Tensors = dict[str, tuple[Any, str]]


def mixed(name: str, columns: int) -> str:
    """The type of a tensor in a file like that: its first block has a layer that is not quantised,
    its second block none that is."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias" or "norm" in path.rpartition(".")[2]:
        return "F32"
    if path.startswith(PLAIN):
        return "BF16"
    wanted = (kind for end, kind in WANTED.items() if path.endswith(end))
    return ggml.possible(next(wanted, "Q4_K"), columns)


@functools.cache
def miniature() -> dict[str, np.ndarray]:
    [path] = FOLDER.glob("*.safetensors")
    file = TensorFile.open(path)
    return {name: file.read(name).float().numpy() for name in file.parts}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    """The miniature, in many types."""
    path = tmp_path_factory.mktemp("gguf") / "mini-lightning-8steps-Q4_K_M.gguf"
    tensors = {name: (value, mixed(name, value.shape[-1])) for name, value in miniature().items()}
    return GgufCheckpoint(ggml.write(path, tensors), MINI_CONFIG)


@functools.cache
def tiny() -> Tensors:
    """Random tensors, all of them in F16."""
    generator = np.random.default_rng(0)
    return {
        name: (generator.standard_normal(shape).astype(np.float32) / 16, "F16")
        for name, shape in expected(TINY)[1].items()
    }


def written(folder: Path, tensors: Mapping[str, tuple[Any, str]], **options: Any) -> Path:
    return ggml.write(folder / "tiny.gguf", tensors, **options)


def refusal(path: Path, config: TransformerConfig | None = None) -> str:
    with pytest.raises(ModelMismatch) as caught:
        GgufCheckpoint(path, config)
    return caught.value.message


def source_of(checkpoint: Checkpoint, config: TransformerConfig, dtype: torch.dtype) -> Skeleton:
    """Its layers in their places, but for modulation's."""
    with META:
        made = Skeleton(config)
    for path in checkpoint.linears:
        if "_mod." not in path and path != "norm_out.linear":
            made.set_submodule(path, checkpoint.linear(path, CPU, dtype))
    for name in checkpoint.others:
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(checkpoint.other(name).to(dtype), requires_grad=False)
        setattr(made.get_submodule(path), leaf, parameter)
    return made


@functools.cache
@torch.inference_mode()
def stock(checkpoint: GgufCheckpoint, dtype: torch.dtype) -> list[Tensor]:
    """Velocities by diffusers' module, with the weights that the file stands for, in a type."""
    made = Skeleton(checkpoint.config)
    state = {name: checkpoint.other(name) for name in made.state_dict()}
    made.load_state_dict({name: value.float() for name, value in state.items()})
    model = upstream.transformer(made).to(dtype)
    return [upstream.velocity(model, given).float() for given in rows(dtype)]


def errors(checkpoint: GgufCheckpoint, dtype: torch.dtype, compute: Compute) -> list[float]:
    """Of what serves, relative, by row."""
    served = Transformer(
        source_of(checkpoint, checkpoint.config, dtype),
        CPU,
        dtype,
        round_to=ROUND_TO[compute],
        read=functools.partial(checkpoint.full, device=CPU),
    ).eval()
    return from_exact(checkpoint, velocities(served, rows(dtype)))


def from_exact(checkpoint: GgufCheckpoint, found: list[Tensor]) -> list[float]:
    """How far velocities are from those in float32, relative, by row."""
    pairs = zip(found, stock(checkpoint, torch.float32), strict=True)
    return [relative(one.float(), exact) for one, exact in pairs]


def rows(dtype: torch.dtype) -> list[Row]:
    return [
        dataclasses.replace(row, image=row.image.to(dtype), text=row.text.to(dtype)) for row in ROWS
    ]


def test_products_with_decoded_weights_are_exact(mini: GgufCheckpoint) -> None:
    assert max(errors(mini, torch.float32, "bf16")) <= EXACT


def test_bf16_is_as_near_as_diffusers_module_in_bf16(mini: GgufCheckpoint) -> None:
    theirs = from_exact(mini, stock(mini, torch.bfloat16))
    for found, other in zip(errors(mini, torch.bfloat16, "bf16"), theirs, strict=True):
        assert 0.01 < found <= 2 * other  # each rounds in other places


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_rounded_products(compute: Compute, mini: GgufCheckpoint) -> None:
    for error in errors(mini, torch.float32, compute):
        assert 0.005 < error <= TOLERANCE[compute]


def test_layers_have_the_files_numbers(mini: GgufCheckpoint) -> None:
    seen = set()
    for path in sorted(mini.linears):
        values = miniature()[f"{path}.weight"]
        kind = mixed(f"{path}.weight", values.shape[1])
        seen.add(kind)
        raw = GGMLQuantizationType[kind]
        exact = torch.from_numpy(np.array(dequantize(ggml.quantise(values, kind), raw)))
        weight, bias = mini.full(path, CPU)
        assert torch.equal(weight.float(), exact)
        assert torch.equal(bias, torch.from_numpy(miniature()[f"{path}.bias"]))
        layer: Any = mini.linear(path, CPU, torch.float32)
        assert torch.equal(layer.bias, bias)
        x = torch.randn(2, layer.in_features)
        assert torch.equal(layer(x), nn.functional.linear(x, exact, bias))
    assert seen >= {"Q4_K", "Q6_K", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "BF16"}


def test_what_is_coded(mini: GgufCheckpoint) -> None:
    kinds = {path: type(mini.linear(path, META, torch.bfloat16)) for path in mini.linears}
    coded = {path for path, kind in kinds.items() if kind is CodedLinear}
    # Among quantised ones it is coded, too: all layers of a block are multiplied in one way.
    assert {"transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.img_mod.1"} <= coded
    assert "txt_in" in coded and "img_in" not in coded  # as in their file
    second = {path for path in coded if path.startswith("transformer_blocks.1.")}
    assert second == {f"transformer_blocks.1.{stream}_mod.1" for stream in ("img", "txt")}


def test_sizes_are_known_before_and_layers_are_empty_on_meta(mini: GgufCheckpoint) -> None:
    for path in sorted(mini.linears)[::7]:
        found, empty = (mini.linear(path, device, torch.bfloat16) for device in (CPU, META))
        for one, other in zip(tensors_of(found), tensors_of(empty), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert other.is_meta
        assert sum(one.nbytes for one in tensors_of(found)) == mini.stored_bytes(path)


def tensors_of(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def test_what_a_file_says_of_itself(mini: GgufCheckpoint) -> None:
    checkpoint: Checkpoint = mini
    assert checkpoint.label.startswith("GGUF Q8_0/")  # modulation's, which is a third of it
    assert checkpoint.lightning_steps is None  # a file's name is not believed
    assert checkpoint.linears | {name.removesuffix(".weight") for name in checkpoint.others} == {
        name.rpartition(".")[0] for name in miniature()
    }


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_the_configuration_is_found_in_shapes(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name: value for name, value in tiny().items()}
    path = written(tmp_path, tensors, architecture=None if prefix else "qwen_image")
    found = GgufCheckpoint(path)
    assert (found.config, found.label, found.lightning_steps) == (TINY, "GGUF F16", None)
    layer = found.linear("img_in", CPU, torch.bfloat16)
    assert type(layer).forward is nn.Linear.forward
    exact = torch.from_numpy(tiny()["img_in.weight"][0].astype(np.float16)).bfloat16()
    assert torch.equal(layer.weight, exact)
    named = {"general.name": "Qwen Image Edit Lightning V1.0 4 steps"}
    assert GgufCheckpoint(written(tmp_path, tensors, entries=named)).lightning_steps == 4


@pytest.mark.parametrize("shape", [(), (1,), (0,)])
def test_comfyuis_mark_of_2511(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = written(tmp_path, tiny() | {ZERO_COND: (np.zeros(shape, np.float32), "F32")})
    assert GgufCheckpoint(path).config == dataclasses.replace(TINY, zero_cond_t=True)
    assert ZERO_COND in refusal(path, TINY)
    unmarked = written(tmp_path, tiny())
    assert GgufCheckpoint(unmarked, GgufCheckpoint(unmarked).config).config == TINY
    other = dataclasses.replace(TINY, zero_cond_t=True)
    assert GgufCheckpoint(unmarked, other).config == other


def test_tensors_that_were_reshaped_have_their_shapes_again(tmp_path: Path) -> None:
    name = "transformer_blocks.0.img_mlp.net.2.weight"
    values = tiny()[name][0]
    entries = {f"comfy.gguf.orig_shape.{name}": list(values.shape)}
    changed = tiny() | {name: (values.reshape(-1, 256), "Q8_0")}
    found = GgufCheckpoint(written(tmp_path, changed, entries=entries))
    weight, _ = found.full(name.removesuffix(".weight"), CPU)
    assert (weight - torch.from_numpy(values)).abs().max() < 0.005
    for wrong in ([1, 2], [-256, -1024], [256, 1024, 1, 1, 1]):
        changed_entries = {f"comfy.gguf.orig_shape.{name}": wrong}
        assert name in refusal(written(tmp_path, changed, entries=changed_entries))


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    name = "txt_in.weight"  # of rows of 64
    changed = tiny() | {name: (tiny()[name][0].reshape(-1, 256), "Q4_K")}
    entries = {f"comfy.gguf.orig_shape.{name}": [256, 64]}
    found = refusal(written(tmp_path, changed, entries=entries))
    assert "txt_in.weight has rows of 64" in found and "blocks are of 256" in found


@pytest.mark.parametrize("found", ["flux", "llama"])
def test_another_architecture_is_refused(found: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path, tiny(), architecture=found))
    assert f"architecture '{found}'" in message and "'qwen_image'" in message


def test_another_models_tensors_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"double_blocks.0.w": (np.zeros(4), "F32")}, architecture=None)
    assert "is of no Qwen-Image transformer: it lacks img_in.weight" in refusal(path)
    assert "lacks 77 tensors, the first: img_in.bias, img_in.weight" in refusal(path, TINY)


def test_heads_of_another_size_need_a_configuration(tmp_path: Path) -> None:
    tensors = {name: (value, "F32") for name, value in miniature().items()}
    path = written(tmp_path, tensors)
    assert "heads of 32 in a width of 128" in refusal(path)
    assert GgufCheckpoint(path, MINI_CONFIG).config == MINI_CONFIG


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def message(changes: Tensors, *without: str) -> str:
        made = tiny() | changes
        return refusal(written(tmp_path, {n: t for n, t in made.items() if n not in without}))

    values = np.zeros((4, 4), np.float32)
    assert "lacks the tensor proj_out.bias" in message({}, "proj_out.bias")
    assert "has the tensor extra.weight, which" in message({"extra.weight": (values, "F32")})
    assert "proj_out.weight is (4, 4) in the file" in message({"proj_out.weight": (values, "F32")})
    assert "img_in.weight is (4,), as in no" in message({"img_in.weight": (values[0], "F32")})
    last = {"transformer_blocks.900000.attn.to_q.bias": (values[0], "F32")}
    assert "lacks 32 tensors, the first: transformer_blocks.2." in message(last)
    prefixed = {"diffusion_model.proj_out.bias": (values[0], "F32")}
    assert "proj_out.bias with a prefix and without" in message(prefixed)


def test_types_that_are_not_decoded_are_refused(tmp_path: Path) -> None:
    name = "txt_in.weight"
    blocks = np.zeros((256, 36), np.uint8)
    path = written(tmp_path, tiny() | {name: (blocks, "IQ4_NL")})
    assert "txt_in.weight is in IQ4_NL; this worker reads F32, F16" in refusal(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_numbers_that_are_not_finite_are_refused(kind: str, tmp_path: Path) -> None:
    values = tiny()["proj_out.weight"][0].copy()
    values[3, 5] = np.inf
    path = written(tmp_path, tiny() | {"proj_out.weight": (values, kind)})
    checkpoint = GgufCheckpoint(path)
    for read in (
        lambda: checkpoint.linear("proj_out", CPU, torch.bfloat16),
        lambda: checkpoint.full("proj_out", CPU),
    ):
        with pytest.raises(ModelMismatch, match=r"tiny\.gguf: proj_out\.weight is damaged"):
            read()
