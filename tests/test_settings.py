"""The environment is read once, through a mapping; a bad value is named with what is allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from image_worker.errors import InvalidSettings
from image_worker.settings import Settings


def test_defaults() -> None:
    settings = Settings.from_env({})
    assert settings.model == "auto"
    assert settings.precision_mode == "auto"
    assert settings.use_lightning_lora is True
    assert settings.lightning_steps == 8
    assert settings.default_cfg_scale is None


def test_values_are_converted() -> None:
    settings = Settings.from_env(
        {
            "MODEL": "edit-2511",
            "LIGHTNING_STEPS": "4",
            "USE_LIGHTNING_LORA": "0",
            "GPU_MAX_GIB": "11.5",
            "MODEL_DIR": "/weights",
            "BATCH_SIZE": "2",
            "HOME": "/irrelevant",
        }
    )
    assert settings.model == "edit-2511"
    assert settings.lightning_steps == 4
    assert settings.use_lightning_lora is False
    assert settings.gpu_max_gib == 11.5
    assert settings.model_dir == Path("/weights")
    assert settings.batch_size == 2


def test_an_empty_value_is_unset() -> None:
    assert Settings.from_env({"MODEL_ID": "", "BATCH_SIZE": " "}) == Settings.from_env({})


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("MODEL", "edit-2510", "edit-2509"),
        ("PRECISION_MODE", "fp4", "bf16, fp8, 8bit, svdq, 4bit"),
        ("LIGHTNING_STEPS", "5", "4, 8"),
        ("SVDQ_RANK", "48", "32, 64, 128"),
        ("LIGHTNING_STEPS", "eight", "4, 8"),
        ("USE_LIGHTNING_LORA", "maybe", "1 or 0"),
        ("GPU_MAX_GIB", "0", "a number above 0, up to 1024"),
        ("GPU_MAX_GIB", "1e308", "a number above 0, up to 1024"),
        ("GPU_MAX_GIB", "inf", "a number above 0"),
        ("DEFAULT_CFG_SCALE", "0.5", "a number from 1 to 20"),
        ("DEFAULT_CFG_SCALE", "nan", "a number from 1 to 20"),
        ("BATCH_SIZE", "0", "a whole number from 1 to 64"),
        ("BATCH_SIZE", "2.5", "a whole number from 1 to 64"),
        ("API_PORT", "70000", "a whole number from 1 to 65535"),
        ("CPU_OFFLOAD", "sequential", "auto, none, stream"),
        ("QUANTIZE_COMPONENTS", "vae", "all, text"),
        ("BNB_COMPUTE", "fp32", "bf16, fp16"),
    ],
)
def test_a_bad_value_is_explained(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env({variable: value})
    assert variable in str(caught.value)
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_env({"MODEL": "x", "BATCH_SIZE": "y"})
    assert "MODEL='x'" in str(caught.value)
    assert "BATCH_SIZE='y'" in str(caught.value)


@pytest.mark.parametrize(
    "env",
    [
        {"INT8_CPU_OFFLOAD": "1", "CPU_OFFLOAD": "none"},
        {"INT8_CPU_OFFLOAD": "1", "PRECISION_MODE": "4bit"},
        {"QUANTIZE_COMPONENTS": "text", "PRECISION_MODE": "bf16"},
        {"TEXT_ENCODER_CHECKPOINT": "me/mine:x", "KEEP_PREPARED": "whole"},
        {"CHECKPOINT_LIGHTNING": "4"},
        {"CHECKPOINT_DECODE": "1"},
        {"CHECKPOINT": "me/x:y", "CHECKPOINT_DECODE": "1", "COMPUTE": "fp8", "BNB_COMPUTE": "fp16"},
        {"SVDQ_RANGES": "x", "PRECISION_MODE": "svdq", "KEEP_PREPARED": "whole"},
        {"ATTENTION": "int8", "BNB_COMPUTE": "fp16"},
        {"COMPUTE": "fp8", "PRECISION_MODE": "8bit"},
        {"COMPUTE": "fp8", "BNB_COMPUTE": "fp16"},
        {"COMPUTE": "int8", "PRECISION_MODE": "fp8"},
        {"COMPUTE": "int8", "PRECISION_MODE": "bf16"},
        {"COMPUTE": "int8", "QUANTIZE_COMPONENTS": "text"},
        {"SVDQ_RANK": "128"},
        {"SVDQ_RANK": "64", "PRECISION_MODE": "4bit"},
        {"SVDQ_RANGES": "ranges.safetensors"},
        {
            "SVDQ_RANGES": "ranges.safetensors",
            "PRECISION_MODE": "svdq",
            "QUANTIZE_COMPONENTS": "text",
        },
    ],
)
def test_contradictions_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(InvalidSettings, match=r"contradicts|no meaning|drop one|drop it"):
        Settings.from_env(env)


@pytest.mark.parametrize("precision", ["auto", "8bit", "4bit"])
def test_products_in_int8_may_be_asked_for(precision: str) -> None:
    env = {"COMPUTE": "int8", "PRECISION_MODE": precision, "BNB_COMPUTE": "fp16"}
    assert Settings.from_env(env).compute == "int8"


def test_frozen() -> None:
    settings: Any = Settings.from_env({})
    with pytest.raises(ValidationError):
        settings.model = "mini"


def test_only_from_env_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_SIZE", "7")
    assert Settings.from_env({}).batch_size == 4
    assert Settings.from_env(os.environ).batch_size == 7
