"""Starts with Lightning beside a checkpoint of another program: what they plan, keep and answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from image_worker.catalog import LIGHTNING_SAMPLER
from image_worker.edit.batching import Limits
from image_worker.edit.conditions import encode
from image_worker.edit.denoise import start, step
from image_worker.errors import ModelMismatch
from image_worker.model import build as build_module
from image_worker.model.adapters import Adapter
from image_worker.model.build import Model, build
from image_worker.model.formats.gguf_checkpoint import GgufCheckpoint
from image_worker.model.hardware import detect_hardware
from image_worker.model.lora import Lora
from image_worker.model.placement import Plan
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import MINI, MINI_FOLDER, build_mini, make_picture
from tests.model.test_beside import CPU, LIGHTNING, gguf, of_all_layers, opened, scaled_fp8
from tests.model.test_opening import NO_LORA, saved, steps
from tests.model.test_stream import edit, passing
from tests.pictures import psnr
from tests.worker_jobs import job, picture

STYLE = "miniature-outlined-style-bf16.safetensors"


def built(loras: Any = (), first_edit: Any = None, **variables: Any) -> Model:
    """With LoRAs for all jobs, in float32."""
    settings = Settings.from_env({name.upper(): str(value) for name, value in variables.items()})
    options = {"dtype": torch.float32, "loras": loras, "first_edit": first_edit}
    return build(settings, MINI, detect_hardware(settings), **options)


def image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def as_numbers(path: Path, folder: Path) -> str:
    """The weights that a file stands for, in one of 32 bits."""
    found = opened(path)
    wide = {name: found.other(name).float().contiguous() for name in found.others}
    for layer in found.linears:
        weight, bias = found.full(layer, CPU)
        wide |= {f"{layer}.weight": weight.float(), f"{layer}.bias": bias.float()}
    return saved(wide, folder)


@pytest.mark.parametrize(("file", "lightning"), [(scaled_fp8, 8), (gguf, 4)])
def test_the_picture_is_the_merged_ones(
    file: Callable[[Path], Path], lightning: int, tmp_path: Path
) -> None:
    path = file(tmp_path)
    options = {"precision_mode": "bf16", "compute": "bf16", "lightning_steps": lightning}
    live = built(checkpoint=path, **options)
    assert live.steps == live.lightning_steps == lightning
    assert live.sampler == LIGHTNING_SAMPLER
    merged = built(checkpoint=as_numbers(path, tmp_path), **options)
    expected = image(edit(merged))
    assert psnr(image(edit(live)), expected) > 60
    live.transformer.beside = None
    assert psnr(image(edit(live)), expected) < 55, "it does something"


def test_prepared_weights_are_the_same_with_any_lora_and_tables_are_not(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = gguf(tmp_path)
    every = of_all_layers(opened(path), tmp_path)  # modulation's layers, too
    kept = {"keep_prepared": "1", "model_dir": tmp_path, "checkpoint": path}
    starts: list[dict[str, Any]] = [{}, NO_LORA, {"loras": [every]}]
    expected = [edit(built(checkpoint=path, **given)) for given in starts]
    for given, pixels in zip(starts, expected, strict=True):
        model = built(**kept, **given, first_edit=edit)
        assert "prepare" in steps(model), "the tables, if nothing else"
        assert torch.equal(edit(model), pixels)
    [folder] = (tmp_path / "prepared").iterdir()
    assert len(list(folder.glob("transformer/modulation*"))) == 3
    again = "tables that were kept are made again"
    monkeypatch.setattr(GgufCheckpoint, "full", lambda *_, **__: pytest.fail(again))
    for given, pixels in zip(starts, expected, strict=True):
        model = built(**kept, **given, first_edit=edit)
        assert "prepare" not in steps(model)
        assert torch.equal(edit(model), pixels)


def test_it_stays_where_room_is_made_and_blocks_pass(tmp_path: Path, monkeypatch: Any) -> None:
    path = scaled_fp8(tmp_path)
    model = built(checkpoint=path)
    expected = edit(model)
    assert not model.make_room()
    assert torch.equal(edit(model), expected)
    found = Plan("bf16", passing(model, every=True))
    monkeypatch.setattr(build_module, "plan", lambda *_: found)
    assert torch.equal(edit(built(checkpoint=path)), expected)


def test_the_plan_counts_it(tmp_path: Path, monkeypatch: Any) -> None:
    path, rest = scaled_fp8(tmp_path), []

    def plan(settings: Settings, sizes: Any, *_: Any) -> Plan:
        rest.append(sizes["4bit"].rest)
        return Plan("bf16")

    monkeypatch.setattr(build_module, "plan", plan)
    models = [built(checkpoint=path, **given) for given in (NO_LORA, {})]
    assert rest[1] - rest[0] >= models[1].transformer.beside.nbytes > 0
    assert models[0].transformer.beside is None


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: Any
) -> None:
    other = tmp_path / "other.safetensors"
    layer = "transformer_blocks.70.attn.to_q.lora"
    save_file(
        {f"{layer}_A.weight": torch.ones(1, 128), f"{layer}_B.weight": torch.ones(128, 1)}, other
    )
    monkeypatch.delattr(build_module, "_load")
    with pytest.raises(ModelMismatch, match=r"other\.safetensors does not fit the model"):
        built([other], checkpoint=scaled_fp8(tmp_path))


def test_jobs_share_forwards_with_those_of_the_same_loras(tmp_path: Path) -> None:
    model = build_mini(checkpoint=str(scaled_fp8(tmp_path)))
    lora = Lora.read(LIGHTNING.with_name(STYLE))
    own = Adapter.of("own", [(lora, 1.0)], model.transformer.reads, CPU, torch.float32)
    given = encode(model, "blur it", None, [make_picture()])
    options: dict[str, Any] = {"seed": 1, "steps": 2, "cfg_scale": 1.0}
    pictures = [start(model, given, (64, 64), **options, adapter=one) for one in (None, own, own)]
    assert step(model, pictures, Limits(4)) == [1, 2]


def test_a_job_with_loras_of_its_own_and_the_next_one(tmp_path: Path) -> None:
    """Through the worker: what replies say, and that Lightning is as before."""
    path = gguf(tmp_path)
    settings = Settings.from_env(
        {"MODEL": "mini", "CHECKPOINT": str(path), "LORA_DIR": str(MINI_FOLDER / "loras")}
    )
    worker = Worker.from_settings(settings)
    given: dict[str, Any] = {"seed": 1, "num_inference_steps": None}
    before = worker.run_blocking(job(**given))
    styled = worker.run_blocking(job(**given, loras=[{"source": STYLE}]))
    after = worker.run_blocking(job(**given))
    worker.close()
    assert (before["lightning_enabled"], before["num_inference_steps"]) == (True, 8)
    assert before["precision"].startswith("GGUF") and before["loras"] == []
    assert styled["lightning_enabled"] and styled["loras"] == [{"name": STYLE, "scale": 1.0}]
    assert after["images"] == before["images"] != styled["images"]
    both = Worker(
        settings,
        build(settings, MINI, detect_hardware(settings), loras=[LIGHTNING.with_name(STYLE)]),
    )
    expected = both.run_blocking(job(**given))
    both.close()
    assert psnr(picture(styled), picture(expected)) > 40
