"""nunchaku's files: one that its own packer made, others of other shapes, and damaged ones.

The first is of a tiny random model; beside it are the weights that it stands for, an input, and
what diffusers' module makes of that.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from image_worker.bench.ways import relative
from image_worker.compute import Compute
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats import fragments
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.nunchaku import NunchakuCheckpoint
from image_worker.model.linear import Decoded
from image_worker.model.packed import slots
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from tests.model.nunchaku_files import Writer
from tools import nunchaku

FOLDER = Path(__file__).parents[1] / "data" / "nunchaku_tiny"
FILE = FOLDER / "svdq-int4_r32-tiny.safetensors"
EFFECTIVE = FOLDER / "effective-r32.safetensors"
CPU, META = torch.device("cpu"), torch.device("meta")
BF16_STEP = 2.0**-8  # between numbers of about 1, such as biases to which 1 was added
# Widths of one tile and a half, and no two numbers that are alike.
SMALL = TransformerConfig(
    num_layers=2,
    num_attention_heads=3,
    attention_head_dim=64,
    joint_attention_dim=40,
    in_channels=32,
    axes_dims_rope=(8, 24, 32),
    zero_cond_t=True,
)


def checkpoint(path: Path = FILE) -> NunchakuCheckpoint:
    return NunchakuCheckpoint(TensorFile.open(path))


@functools.cache
def effective() -> dict[str, Tensor]:
    return load_file(EFFECTIVE)


def weight_of(layer: nn.Module) -> Tensor:
    """float32."""
    if not isinstance(layer, CodedLinear):
        return layer.weight.float()  # type: ignore[operator, union-attr]
    found = torch.empty(layer.weight.shape)
    layer.weight.decode(found)
    return found


def test_the_whole_model_is_there() -> None:
    found = checkpoint()
    assert found.label == "SVDQuant int4, rank 32"
    assert found.lightning_steps is None
    assert (found.config.num_layers, found.config.width) == (2, 128)
    names = {f"{path}.{leaf}" for path in found.linears for leaf in ("weight", "bias")}
    assert names | found.others == set(Skeleton(found.config).state_dict())
    assert not names & found.others


def test_weights_are_those_that_the_file_stands_for() -> None:
    found = checkpoint()
    for path in found.linears:
        weight, bias = found.full(path, CPU)
        assert weight.dtype in (torch.float32, torch.bfloat16)
        torch.testing.assert_close(
            weight.float(), effective()[f"weight.{path}.weight"], rtol=1e-6, atol=1e-7
        )
        # 1 was added to those of modulation before they were rounded.
        tolerance = BF16_STEP if "_mod." in path else 1e-6
        expected = effective()[f"weight.{path}.bias"]
        torch.testing.assert_close(bias.float(), expected, rtol=0, atol=tolerance)
    for name in found.others:
        assert torch.equal(found.other(name).float(), effective()[f"weight.{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_as_the_meta_device_has_them(dtype: torch.dtype) -> None:
    found = checkpoint()
    for path in found.linears:
        layer, empty = (found.linear(path, device, dtype) for device in (CPU, META))
        facts = [
            [(slot.name, slot.tensor.dtype, slot.tensor.shape) for slot in slots(one)]
            for one in (layer, empty)
        ]
        assert facts[0] == facts[1]
        assert all(slot.tensor.is_meta for slot in slots(empty))
        assert isinstance(layer, CodedLinear) == (".attn." in path or "_mlp." in path)
        torch.testing.assert_close(
            weight_of(layer), found.full(path, CPU)[0].float(), rtol=2**-8, atol=0
        )
        assert layer.bias.dtype == dtype
        if dtype == torch.bfloat16:
            assert found.stored_bytes(path) == sum(slot.tensor.nbytes for slot in slots(layer))


def serve(found: NunchakuCheckpoint, compute: Compute) -> Transformer:
    with META:
        source = Skeleton(found.config)
    for path in found.linears:
        source.set_submodule(path, found.linear(path, CPU, torch.float32))
    for name in found.others:
        path, _, leaf = name.rpartition(".")
        tensor = nn.Parameter(found.other(name).float(), requires_grad=False)
        setattr(source.get_submodule(path), leaf, tensor)
    return Transformer(source, CPU, torch.float32, round_to=ROUND_TO[compute]).eval()


@pytest.mark.parametrize(("compute", "most"), [("bf16", 1e-3), ("fp8", 0.03), ("int8", 0.01)])
def test_the_transformer_answers_as_diffusers_does(compute: Compute, most: float) -> None:
    with safe_open(EFFECTIVE, "pt") as file:
        [grids] = json.loads(file.metadata()["img_shapes"])
    given = effective()
    row = Row(
        given["in.hidden_states"][0],
        tuple(tuple(grid) for grid in grids),
        given["in.encoder_hidden_states"][0],
        given["in.timestep"].item(),
    )
    served = serve(checkpoint(), compute)
    qkv = served.blocks[0].qkv
    assert isinstance(qkv, Decoded) and len(qkv.weights) == 1
    [found] = velocities(served, [row])
    error = relative(found, given["out.sample"][0, : len(found)])
    assert error <= most
    assert compute == "bf16" or error > 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(128, 12288), (640, 3072), (9216, 128), (192, 320)])
def test_codes_and_scales_of_any_shape(rows: int, columns: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns))
    found = fragments.codes(nunchaku.pack_codes(codes), rows, columns)
    lower, upper = ((found >> shift & 15 ^ 8).to(torch.int8) - 8 for shift in (0, 4))
    assert torch.equal(torch.stack([lower, upper], dim=2).flatten(1), codes.to(torch.int8))
    scales = torch.randn(rows, columns // 64)
    assert torch.equal(fragments.scales(nunchaku.pack_scales(scales), rows, columns), scales)
    values = torch.randint(16, (rows, columns))
    assert torch.equal(fragments.awq_codes(nunchaku.pack_awq(values)), values.byte())


@pytest.mark.parametrize("rank", [16, 32, 48, 128])
@pytest.mark.parametrize("channels", [3072, 12288, 192])
def test_low_rank_factors_of_any_shape(channels: int, rank: int) -> None:
    up, down = torch.randn(channels, rank), torch.randn(rank, channels)
    found = fragments.up(nunchaku.pack_factor(up, down=False), channels)
    assert torch.equal(found, up)
    found = fragments.down(nunchaku.pack_factor(down, down=True), channels)
    assert torch.equal(found, down)


@pytest.mark.parametrize(
    ("heads", "rank", "dtype"),
    [(3, 48, torch.bfloat16), (3, 24, torch.float16), (1, 16, torch.bfloat16)],
)
def test_a_file_whose_layers_fill_no_tiles(
    heads: int, rank: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = dataclasses.replace(SMALL, num_attention_heads=heads)
    made = Writer(config, rank, dtype)
    found = checkpoint(made.write(tmp_path / "made.safetensors"))
    assert found.config == config
    assert found.label == f"SVDQuant int4, rank {rank}"
    for path, expected in made.weights.items():
        weight, bias = found.full(path, CPU)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(bias.double(), made.biases[path], rtol=1e-5, atol=1e-4)
    for path in found.linears:
        layer = found.linear(path, CPU, torch.float32)
        assert torch.equal(weight_of(layer), found.full(path, CPU)[0].float())


def test_points_that_are_not_whole_stay_as_they_are(tmp_path: Path) -> None:
    made = Writer(SMALL, 16, torch.bfloat16)
    name = "transformer_blocks.0.img_mod.1"
    scales, zeros = (made.tensors[f"{name}.{leaf}"] for leaf in ("wscales", "wzeros"))
    zeros[:3] = (-3.4 * scales[:3].float()).to(zeros.dtype)
    scales[0, 0] = 0
    weight, _ = checkpoint(made.write(tmp_path / "made.safetensors")).full(name, CPU)
    codes = fragments.awq_codes(made.tensors[f"{name}.qweight"])
    row = 6 * 5 + 2  # channel 5 of the third output
    expected = codes[row].view(3, 64) * scales[:3, row, None].float() + zeros[:3, row, None].float()
    torch.testing.assert_close(weight[2 * SMALL.width + 5], expected.flatten())
    assert (weight[0, :64] == zeros[0, 0].float()).all()
