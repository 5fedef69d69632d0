"""The cold start: what settings choose, and what happens where the card is smaller than planned."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from image_worker.catalog import LIGHTNING_SAMPLER
from image_worker.errors import DoesNotFit, InvalidSettings, ModelMismatch
from image_worker.model import build as build_module
from image_worker.model import recipe as recipe_module
from image_worker.model.build import build
from image_worker.model.hardware import GIB, Hardware
from image_worker.model.numbers import attends_in_int8, choose_dtype, choose_products
from image_worker.model.recipe import keep_kernels
from image_worker.settings import Settings
from tests.conftest import MINI, MINI_FOLDER, build_mini, mini_model


def test_lightning_decides_sampler_and_steps() -> None:
    with_it, without = mini_model(), mini_model(use_lightning_lora="0")
    assert (with_it.sampler, with_it.steps) == (LIGHTNING_SAMPLER, 8)
    assert without.sampler.terminal == 0.02
    assert without.steps == MINI.steps
    four = build_mini(lightning_steps="4")
    assert four.steps == 4
    weights = [m.transformer.blocks[0].qkv.image.weight for m in (with_it, four)]
    assert not torch.equal(*weights), "each step count has its own LoRA"


def test_a_model_without_that_lightning_is_refused() -> None:
    entry = dataclasses.replace(MINI, lightning={})
    with pytest.raises(InvalidSettings, match="USE_LIGHTNING_LORA=0"):
        build_mini(torch.bfloat16, entry)


@pytest.mark.parametrize(
    ("env", "free", "has_bf16", "dtype", "warns"),
    [
        ({}, GIB, True, torch.bfloat16, False),
        ({"BNB_COMPUTE": "fp16"}, GIB, True, torch.float16, False),
        ({}, GIB, False, torch.float16, True),
        ({}, None, True, torch.bfloat16, False),
        ({}, None, False, torch.float32, False),
    ],
)
def test_the_type_to_compute_in(
    env: dict[str, str],
    free: int | None,
    has_bf16: bool,
    dtype: torch.dtype,
    warns: bool,
    caplog: Any,
) -> None:
    hardware = Hardware("an old card", free, has_bf16)
    assert choose_dtype(Settings.from_env(env), hardware) == dtype
    assert ("an old card has no bfloat16" in caplog.text) is warns


def test_fp16_runs() -> None:
    from image_worker.worker import Worker
    from tests.worker_jobs import job

    worker = Worker.from_settings(Settings.from_env({"MODEL": "mini", "BNB_COMPUTE": "fp16"}))
    assert worker.model.dtype == torch.float16
    assert "images" in worker.run_blocking(job(width=64, height=64))


def _fail_to_load(monkeypatch: Any, times: int) -> list[str]:
    """Makes the first loads run out of memory; notes with which CPU_OFFLOAD each was planned."""
    stock_plan, stock_load, offloads, tried = build_module.plan, build_module._load, [], []

    def plan(settings: Settings, *arguments: Any) -> Any:
        offloads.append(settings.cpu_offload)
        return stock_plan(settings, *arguments)

    def load(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock_load(*arguments)

    monkeypatch.setattr(build_module, "plan", plan)
    monkeypatch.setattr(build_module, "_load", load)
    return offloads


def test_what_does_not_fit_is_tried_again_with_less(monkeypatch: Any, caplog: Any) -> None:
    offloads = _fail_to_load(monkeypatch, 1)
    with caplog.at_level(logging.WARNING):
        model = build_mini(torch.bfloat16, precision_mode="8bit")
    assert offloads == ["auto", "stream"]
    assert "trying again with less of it" in caplog.text
    assert model.plan.precision == "8bit"


HOPPER = Hardware("H200", 100 * GIB, capability=(9, 0))
ADA = Hardware("L40S", 100 * GIB, capability=(8, 9))
AMPERE = Hardware("A100", 100 * GIB, capability=(8, 0))
CPU = Hardware("CPU")


@pytest.mark.parametrize(
    ("attention", "hardware", "expected"),
    [
        ("auto", HOPPER, True),
        ("int8", HOPPER, True),
        ("bf16", HOPPER, False),
        ("auto", ADA, False),
        ("auto", CPU, False),
        ("int8", CPU, True),
    ],
)
def test_where_attention_is_in_int8(attention: str, hardware: Hardware, expected: bool) -> None:
    settings = Settings.from_env({"ATTENTION": attention})
    assert attends_in_int8(settings, hardware, torch.bfloat16) == expected


def test_attention_is_not_in_int8_where_the_model_computes_in_float16() -> None:
    assert not attends_in_int8(Settings.from_env({}), HOPPER, torch.float16)


def test_the_log_says_what_is_computed_in_what(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        build_mini(torch.float32, precision_mode="4bit", compute="int8", attention="int8")
    assert "numbers in float32, products in int8, attention in int8" in caplog.text
    with caplog.at_level(logging.INFO):
        build_mini(torch.float32, precision_mode="bf16")
    assert "numbers in float32, products in float32, attention in float32" in caplog.text


def test_attention_in_int8_that_cannot_run_is_refused(monkeypatch: Any) -> None:
    settings = Settings.from_env({"ATTENTION": "int8"})
    with pytest.raises(InvalidSettings, match=r"ATTENTION=int8 is impossible with .* on L40S"):
        attends_in_int8(settings, ADA, torch.bfloat16)

    def fail(*_: Any) -> None:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(recipe_module, "Int8", fail)
    with pytest.raises(InvalidSettings, match="set ATTENTION=bf16"):
        build_mini(torch.bfloat16, attention="int8")


@pytest.mark.parametrize(
    ("env", "hardware", "precision", "expected"),
    [
        ({}, HOPPER, "4bit", "fp8"),
        ({}, AMPERE, "4bit", "bf16"),
        ({"COMPUTE": "int8"}, AMPERE, "4bit", "int8"),
        ({}, CPU, "4bit", "bf16"),
        ({"COMPUTE": "int8"}, HOPPER, "4bit", "int8"),
        ({"COMPUTE": "int8"}, AMPERE, "8bit", "int8"),
        ({"COMPUTE": "int8"}, CPU, "8bit", "int8"),
        ({"COMPUTE": "fp8"}, CPU, "4bit", "fp8"),
        ({"COMPUTE": "bf16"}, HOPPER, "fp8", "bf16"),
        ({"QUANTIZE_COMPONENTS": "text"}, AMPERE, "4bit", "bf16"),
    ],
)
def test_what_products_are_in(
    env: dict[str, str], hardware: Hardware, precision: Any, expected: str
) -> None:
    settings = Settings.from_env(env)
    assert choose_products(settings, precision, hardware, torch.bfloat16) == expected


@pytest.mark.parametrize(
    ("compute", "hardware", "precision", "takes"),
    [
        (
            "fp8",
            AMPERE,
            "4bit",
            "PRECISION_MODE=fp8 or svdq or 4bit, BNB_COMPUTE=bf16, a card of .* 8.9",
        ),
        ("fp8", HOPPER, "bf16", "PRECISION_MODE=fp8 or svdq or 4bit, BNB_COMPUTE=bf16"),
        ("int8", HOPPER, "bf16", "PRECISION_MODE=8bit or svdq or 4bit, a card of .* 7.5"),
        ("int8", CPU, "bf16", "PRECISION_MODE=8bit or svdq or 4bit$"),
    ],
)
def test_products_that_cannot_be_are_refused(
    compute: str, hardware: Hardware, precision: Any, takes: str
) -> None:
    settings = Settings.from_env({"COMPUTE": compute})
    with pytest.raises(InvalidSettings, match=f"COMPUTE={compute} is impossible.*{takes}"):
        choose_products(settings, precision, hardware, torch.bfloat16)


def test_compiled_kernels_are_kept_beside_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    import triton

    usual = Path.home() / ".triton" / "cache"
    monkeypatch.setattr(triton.knobs.cache, "dir", str(usual))
    assert keep_kernels(Settings(model_dir=tmp_path)) == tmp_path / "kernels" / "cuda"
    assert triton.knobs.cache.dir == str(tmp_path / "kernels" / "triton")
    keep_kernels(Settings(model_dir=tmp_path / "other"))
    assert triton.knobs.cache.dir == str(tmp_path / "kernels" / "triton"), "one was chosen"
    (tmp_path / "file").touch()
    assert keep_kernels(Settings(model_dir=tmp_path / "file")) is None


@pytest.mark.parametrize(("offload", "tries"), [("auto", 2), ("none", 1), ("stream", 1)])
def test_what_never_fits_is_an_error(offload: str, tries: int, monkeypatch: Any) -> None:
    offloads = _fail_to_load(monkeypatch, 9)
    with pytest.raises(DoesNotFit, match="PRECISION_MODE"):
        build_mini(torch.bfloat16, cpu_offload=offload)
    assert len(offloads) == tries


def test_a_first_edit_that_does_not_fit_is_tried_again_with_less(monkeypatch: Any) -> None:
    offloads, seen = _fail_to_load(monkeypatch, 0), []

    def first_edit(model: Any) -> None:
        seen.append(model)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    build(Settings.from_env({}), MINI, Hardware("CPU"), first_edit=first_edit)
    assert offloads == ["auto", "stream"] and len(seen) == 2


@pytest.mark.parametrize(
    ("component", "name", "value"),
    [
        ("transformer", "_class_name", "FluxTransformer"),
        ("transformer", "use_layer3d_rope", True),
        ("vae", "attn_scales", [1.0]),
    ],
)
def test_another_architecture_is_refused(
    component: str, name: str, value: Any, tmp_path: Path
) -> None:
    shutil.copytree(MINI_FOLDER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    complaint = value if name == "_class_name" else name
    with pytest.raises(ModelMismatch, match=complaint):
        build_mini(torch.bfloat16, dataclasses.replace(MINI, repo=str(tmp_path)))


def test_the_log_tells_of_every_step(caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        model = build(Settings.from_env({}), MINI, Hardware("CPU"))
    for name in (
        "find files",
        "plan: mini",
        "load text_encoder",
        "load transformer",
        "load vae",
    ):
        assert name in caplog.text
    assert [step.name for step in model.cold_start.steps][-1] == "load transformer"
