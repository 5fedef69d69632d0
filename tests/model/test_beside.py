"""Lightning beside weights that are in a format of their own: as if it were merged in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from image_worker.bench.ways import relative
from image_worker.compute import Compute
from image_worker.errors import InvalidSettings, ModelMismatch
from image_worker.model.adapters import PRODUCTS, Adapter
from image_worker.model.beside import Beside
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.in_folder import read_json
from image_worker.model.lora import Lora
from image_worker.model.low_rank import Reads
from image_worker.model.opened import open_transformer, read_beside
from image_worker.model.opening import in_own_format, open_checkpoint
from image_worker.model.skeleton import Skeleton
from image_worker.model.sources import Sources
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from image_worker.settings import Settings
from tests import upstream
from tests.conftest import MINI_FOLDER
from tests.model import test_nunchaku
from tests.model.rows import EXACT
from tests.model.test_gguf_checkpoint import mixed, source_of
from tests.model.test_scaled_fp8 import CONFIG, FP8, quantised, weights
from tools import ggml

WIDE: Reads = dict.fromkeys(PRODUCTS)
CPU, META = torch.device("cpu"), torch.device("meta")
LIGHTNING = MINI_FOLDER / "loras" / "miniature-lightning-8steps-V1.0-bf16.safetensors"


def scaled_fp8(folder: Path) -> Path:
    """With a layer of the timestep's embedding in FP8, too."""
    path, tensors = folder / "file.safetensors", quantised(weights(lora=False))
    name = "time_text_embed.timestep_embedder.linear_1"
    weight = tensors[f"{name}.weight"].float()
    scale = weight.abs().amax() / 448
    tensors |= {f"{name}.weight": (weight / scale).to(FP8), f"{name}.scale_weight": scale}
    save_file(tensors, path)
    return path


def gguf(folder: Path) -> Path:
    tensors = {name: tensor.float().numpy() for name, tensor in weights(lora=False).items()}
    return ggml.write(
        folder / "file.gguf",
        {name: (value, mixed(name, value.shape[-1])) for name, value in tensors.items()},
    )


def svdq(folder: Path) -> Path:
    """A small random model, by nunchaku's own packer."""
    return test_nunchaku.FILE


def opened(path: Path) -> Checkpoint:
    config = test_nunchaku.checkpoint().config if path == test_nunchaku.FILE else CONFIG
    found = in_own_format(open_checkpoint(path, config))
    assert found is not None
    return found


def config_of(checkpoint: Checkpoint) -> TransformerConfig:
    return test_nunchaku.checkpoint().config if checkpoint.path == test_nunchaku.FILE else CONFIG


def of_all_layers(checkpoint: Checkpoint, folder: Path, seed: int = 0) -> Path:
    """A LoRA's file that changes every layer there is, those of the timestep, too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in sorted(checkpoint.linears):
        rows, columns = checkpoint.linear(path, META, torch.float32).weight.shape  # type: ignore[operator, union-attr, misc]
        down = torch.randn(4, columns, generator=generator)
        up = torch.randn(rows, 4, generator=generator)
        tensors[f"{path}.lora_down.weight"] = down * columns**-0.5
        tensors[f"{path}.lora_up.weight"] = up * 0.1
    file = folder / f"lora-{seed}.safetensors"
    save_file(tensors, file)
    return file


def rows(checkpoint: Checkpoint) -> list[Row]:
    config = config_of(checkpoint)
    generator = torch.Generator().manual_seed(1)
    return [
        Row(
            torch.randn(side * side + 64, config.in_channels, generator=generator),
            ((1, side, side), (1, 8, 8)),
            torch.randn(text, config.joint_attention_dim, generator=generator),
            0.75,
        )
        for side, text in ((8, 21), (6, 5))
    ]


def served(checkpoint: Checkpoint, beside: Beside | None, compute: Compute) -> Transformer:
    source: Any = source_of(checkpoint, config_of(checkpoint), torch.float32)
    return Transformer(
        source,
        CPU,
        torch.float32,
        round_to=ROUND_TO[compute],
        read=functools.partial(checkpoint.full, device=CPU),
        beside=beside,
    ).eval()


@torch.inference_mode()
def stock(checkpoint: Checkpoint, *loras: Path) -> list[Tensor]:
    """By diffusers' module, with the weights that the file stands for, and LoRAs merged in them."""
    read = [Lora.read(path) for path in loras]
    state = {name: checkpoint.other(name).float() for name in checkpoint.others}
    for path in checkpoint.linears:
        weight, bias = (part.float() for part in checkpoint.full(path, CPU))
        for lora in read:
            weight = lora.merge(path, weight)
        state |= {f"{path}.weight": weight, f"{path}.bias": bias}
    made = Skeleton(config_of(checkpoint))
    made.load_state_dict(state)
    model, found = upstream.transformer(made), []
    for given in rows(checkpoint):
        output = model(
            hidden_states=given.image[None],
            encoder_hidden_states=given.text[None],
            timestep=torch.tensor([given.timestep]),
            img_shapes=[list(given.shapes)],
            return_dict=False,
        )[0]
        found.append(output[0, : given.shapes[0][1] * given.shapes[0][2]])
    return found


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("file", "compute"),
    [(scaled_fp8, "fp8"), (gguf, "bf16"), (svdq, "bf16"), (svdq, "fp8")],
)
def test_beside_is_merged_in_every_format(
    file: Callable[[Path], Path], compute: Compute, tmp_path: Path
) -> None:
    """With a job's own LoRA on top, and without it again."""
    checkpoint = opened(file(tmp_path))
    paths = [of_all_layers(checkpoint, tmp_path)]
    if file is not svdq:
        paths.append(LIGHTNING)
    beside = Beside.read(paths, config_of(checkpoint))
    own = of_all_layers(checkpoint, tmp_path, seed=1)
    given = rows(checkpoint)
    plain, live = served(checkpoint, None, compute), served(checkpoint, beside, compute)
    rounding = distance(velocities(plain, given), stock(checkpoint))
    found, merged = velocities(live, given), stock(checkpoint, *paths)
    assert distance(found, merged) < 2 * rounding + EXACT
    assert distance(stock(checkpoint), merged) > 2 * distance(found, merged), "it does something"
    adapter = Adapter.of("own", [(Lora.read(own), 1.0)], live.reads, CPU, torch.float32)
    on_top = velocities(live, given, adapter)
    assert distance(on_top, stock(checkpoint, *paths, own)) < 2 * rounding + EXACT
    assert distance(on_top, merged) > 2 * distance(found, merged)
    again = velocities(live, given)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_what_it_takes_on_the_card_is_known_before(tmp_path: Path) -> None:
    checkpoint = opened(svdq(tmp_path))
    beside = Beside.read([of_all_layers(checkpoint, tmp_path)], test_nunchaku.checkpoint().config)
    assert (
        beside.card_bytes(torch.bfloat16)
        >= beside.adapter([WIDE] * 2, CPU, torch.bfloat16).nbytes
        > 0
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformer_blocks.70.attn.to_q": (128, 128)}, r"blocks\.70\.attn\.to_q is no linear"),
        ({"transformer_blocks.1.attn.to_q": (64, 128)}, r"is \(64, 128\) in the file and \(128,"),
    ],
)
def test_a_lora_of_another_model_is_refused(
    change: dict[str, tuple[int, int]], said: str, tmp_path: Path
) -> None:
    tensors = {}
    for path, (height, width) in change.items():
        tensors[f"{path}.lora_down.weight"] = torch.ones(1, width)
        tensors[f"{path}.lora_up.weight"] = torch.ones(height, 1)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelMismatch, match=rf"other\.safetensors does not fit the model.*{said}"):
        Beside.read([tmp_path / "other.safetensors"], CONFIG)


@pytest.mark.parametrize("steps", ["auto", "0"])
def test_a_file_that_is_called_lightning_is_asked_about(steps: str, tmp_path: Path) -> None:
    path = scaled_fp8(tmp_path).rename(tmp_path / "Some-Lightning-fp8.safetensors")
    config = read_json(MINI_FOLDER / "transformer" / "config.json")
    found = Sources(MINI_FOLDER, (LIGHTNING,), checkpoint=path)
    settings = Settings.from_env({"CHECKPOINT": str(path), "CHECKPOINT_LIGHTNING": steps})
    if steps == "auto":
        with pytest.raises(InvalidSettings, match="CHECKPOINT_LIGHTNING=4 or 8 if it is, or 0"):
            open_transformer(found, settings, config)
        without = settings.model_copy(update={"use_lightning_lora": False})
        assert open_transformer(found, without, config)
        return
    beside = read_beside(found, open_transformer(found, settings, config), config)
    assert beside and beside.paths == (LIGHTNING,)


@pytest.mark.parametrize("name", ["Some-Lightning-bf16", "rapid-4step", "x_8 Steps"])
def test_so_is_one_in_16_bits(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    save_file(weights(), path)
    found = Sources(MINI_FOLDER, (LIGHTNING,), checkpoint=path)
    config = read_json(MINI_FOLDER / "transformer" / "config.json")
    with pytest.raises(InvalidSettings, match="CHECKPOINT_LIGHTNING=4 or 8 if it is, or 0"):
        open_transformer(found, Settings.from_env({"CHECKPOINT": str(path)}), config)
    named = {"CHECKPOINT": str(path), "CHECKPOINT_LIGHTNING": "0"}
    assert open_transformer(found, Settings.from_env(named), config)
