"""What the doctor says of the file that TEXT_ENCODER_CHECKPOINT names, before any download."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from image_worker import __main__ as command
from image_worker.commands import doctor
from image_worker.commands.facts import Places, PreparedFolder
from image_worker.errors import WorkerError
from image_worker.model import weights as model_weights
from image_worker.model.components import TEXT_ENCODER
from image_worker.model.full_sizes import FOLDER
from tests.commands.test_checkpoint_file import full_size_file, hollow, judge, judge_without
from tests.commands.test_doctor import (
    LARGE,
    MIDDLE,
    _sizes_are_computed_once,
    about,
    facts,
    problems,
)
from tests.conftest import build_mini
from tests.model.test_text_checkpoint import quantised, saved, weights

__all__ = ["_sizes_are_computed_once"]
SHAPES = model_weights.shapes_of(TEXT_ENCODER.empty(FOLDER / "text_encoder"))
CODED = {
    name
    for name, shape in SHAPES.items()
    if len(shape) == 2 and name.startswith("language_model.layers.")
}
FULL = {"MODEL": "edit-2509"}
COMFYUI = (
    "Comfy-Org/Qwen-Image_ComfyUI:split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"
)


def full_size_encoder(path: Path, kind: str = "F8_E4M3") -> Path:
    """The language model's matrices in one type, the rest in bf16."""
    kinds = {name: kind if name in CODED else "BF16" for name in SHAPES}
    return hollow(path, {name: (kinds[name], tuple(shape)) for name, shape in SHAPES.items()})


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(full_size_encoder(tmp_path_factory.mktemp("full") / "encoder.bin"))


def test_what_is_here_is_recognised_and_planned_for(fp8: str) -> None:
    found, seen = judge(facts(LARGE, **FULL, TEXT_ENCODER_CHECKPOINT=fp8))
    _, plain = judge_without(LARGE)
    assert not problems(found)
    size = f"{Path(fp8).stat().st_size / 1e9:.1f}"
    assert about(found, "text encoder") == (
        f"ok encoder.bin is here: FP8 without scales, {size} GB"
    )
    assert plain.checkpoint - seen.checkpoint == pytest.approx(16.6e9, rel=0.01)
    coded = sum(SHAPES[name].numel() for name in CODED)
    saved_bytes = plain.prepared["bf16"] - seen.prepared["bf16"]
    assert saved_bytes == pytest.approx(coded, rel=0.001), "a byte a weight, not two"
    assert seen.prepared["4bit"] > plain.prepared["4bit"] + coded / 3
    own = {row.precision: row.peak for row in seen.rows}
    theirs = {row.precision: row.peak for row in plain.rows}
    assert own["bf16"] < theirs["bf16"] and own["4bit"] > theirs["4bit"]
    assert [row.products for row in seen.rows] == [row.products for row in plain.rows]
    assert "edit-2509 in a text encoder in FP8 without scales, the rest in" in about(found, "model")
    text = doctor.as_text(found, seen)
    assert "edit-2509 on this card, its text encoder in FP8 without scales, the rest in:" in text
    assert "measured on one" not in text and "0.92 s" not in text


def test_beside_a_transformer_in_one_file(fp8: str, tmp_path: Path) -> None:
    transformer = full_size_file(tmp_path / "x")
    env = {"CHECKPOINT": str(transformer), "USE_LIGHTNING_LORA": "0", **FULL}
    found, seen = judge(facts(LARGE, TEXT_ENCODER_CHECKPOINT=fp8, **env))
    assert not problems(found)
    assert "0.3 GB are to be downloaded" in about(found, "model files"), "the VAE alone"
    assert len({row.peak for row in seen.rows}) == 1, "nothing is left for precisions"
    assert seen.own == "transformer in FP8 without scales and text encoder in FP8 without scales"
    found, _ = judge(facts(LARGE, TEXT_ENCODER_CHECKPOINT=fp8, PRECISION_MODE="4bit", **env))
    [problem] = problems(found)
    assert "PRECISION_MODE=4bit has no meaning where CHECKPOINT and TEXT_ENCODER" in problem


def test_16_bits_are_stored_as_settings_say(tmp_path: Path) -> None:
    path = full_size_encoder(tmp_path / "x", "BF16")
    found, seen = judge(facts(LARGE, **FULL, TEXT_ENCODER_CHECKPOINT=str(path)))
    assert about(found, "text encoder").startswith("ok x is here: 16 bits or more, 15.")
    assert not seen.own and seen.rows == judge_without(LARGE)[1].rows


def test_what_is_not_here_is_downloaded_or_missing(tmp_path: Path) -> None:
    env = {"MODEL_DIR": str(tmp_path), "TEXT_ENCODER_CHECKPOINT": COMFYUI, **FULL}
    found, seen = judge(facts(MIDDLE, **env))
    assert not problems(found) and seen.rows == judge_without(MIDDLE)[1].rows
    said = about(found, "text encoder")
    assert said.startswith(f"note {COMFYUI} is to be downloaded: its size is not known")
    assert "downloaded beside TEXT_ENCODER_CHECKPOINT's file" in about(found, "model files")
    given = facts(MIDDLE, LOCAL_ONLY="1", **env)
    found, _ = judge(dataclasses.replace(given, places=Places("/models", 0, has_model=True)))
    assert "problem it is not on this machine, and LOCAL_ONLY=1" in about(found, "text encoder")
    assert not list(tmp_path.iterdir())


def test_whole_prepared_weights_do_not_stand_for_what_such_a_start_reads(fp8: str) -> None:
    prepared = PreparedFolder("edit-2509-bf16-0123456789abcdef-whole", "edit-2509", "bf16", 1)
    places = Places("/models", 10**12, prepared=(prepared,))
    for env, is_missing in ({"TEXT_ENCODER_CHECKPOINT": fp8}, True), ({}, False):
        given = dataclasses.replace(facts(LARGE, LOCAL_ONLY="1", **FULL, **env), places=places)
        found, _ = judge(given)
        assert bool(problems(found)) == is_missing


@pytest.mark.parametrize(
    ("name", "env", "said"),
    [
        ("fp8", {"QUANTIZE_COMPONENTS": "text"}, "QUANTIZE_COMPONENTS=text has no meaning with a"),
        ("missing", {}, "1 faults, the first: language_model.norm.weight is missing"),
        ("shape", {}, r"language_model.norm.weight is \(3,\), expected"),
        ("t5", {}, "is a T5 encoder"),
    ],
)
def test_what_a_start_refuses_is_a_problem(
    name: str, env: dict[str, str], said: str, tmp_path: Path
) -> None:
    key = "model.norm.weight"
    tensors = {
        "fp8": quantised,
        "missing": lambda: {name: one for name, one in weights().items() if name != key},
        "shape": lambda: weights() | {key: torch.zeros(3)},
        "t5": lambda: {"encoder.block.0.weight": torch.zeros(2)},
    }[name]()
    path = str(saved(tensors, tmp_path))
    found, _ = judge(facts(MODEL="mini", TEXT_ENCODER_CHECKPOINT=path, **env))
    [problem] = problems(found)
    assert re.search(said, problem)
    with pytest.raises(WorkerError):
        build_mini(
            text_encoder_checkpoint=path, **{name.lower(): value for name, value in env.items()}
        )


def test_from_start_to_end(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("TEXT_ENCODER_CHECKPOINT", str(saved(quantised(), tmp_path)))
    monkeypatch.setattr("sys.argv", ["image_worker", "doctor"])
    assert command.main() == 0
    assert "ok       text encoder: file.bin is here: FP8 with" in capsys.readouterr().out
    monkeypatch.setenv("TEXT_ENCODER_CHECKPOINT", "me/mine:x.safetensors")
    monkeypatch.setenv("LOCAL_ONLY", "1")
    assert command.main() == 1
    assert "problem  text encoder: it is not on this machine" in capsys.readouterr().out
