"""What the doctor says of the file that CHECKPOINT names, before anything is downloaded."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from image_worker import __main__ as command
from image_worker.catalog import CATALOG
from image_worker.commands import doctor
from image_worker.commands.checkpoint_file import look_at_files
from image_worker.commands.facts import Facts, Finding, Forecast
from image_worker.commands.findings import findings
from image_worker.commands.forecast import forecast
from image_worker.errors import WorkerError
from image_worker.model.components import is_modulation
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.nunchaku_names import Names
from image_worker.model.full_sizes import configs_of
from image_worker.model.skeleton import Skeleton
from tests.commands.test_doctor import (
    LARGE,
    MIDDLE,
    SMALL,
    _sizes_are_computed_once,
    about,
    facts,
    problems,
)
from tests.conftest import build_mini
from tests.model.test_scaled_fp8 import quantised, weights
from tools import ggml
from tools.nunchaku import QUANTISATION

__all__ = ["_sizes_are_computed_once"]
NO_LORA = {"USE_LIGHTNING_LORA": "0"}
GGUF = "QuantStack/Qwen-Image-Edit-2509-GGUF:Qwen-Image-Edit-2509-Q4_K_M.gguf"
FP8 = (
    "lightx2v/Qwen-Image-Lightning:"
    "Qwen-Image-Edit-2509/qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors"
)
BYTES = {"F8_E4M3": 1, "I8": 1, "BF16": 2, "I32": 4}
INT4 = (
    "nunchaku-tech/nunchaku-qwen-image-edit-2509:"
    "svdq-int4_r32-qwen-image-edit-2509-lightningv2.0-4steps.safetensors"
)


def skeleton() -> Skeleton:
    """Of Qwen-Image-Edit-2509's transformer."""
    config = TransformerConfig.parse(configs_of(CATALOG["edit-2509"])["transformer"])
    with torch.device("meta"):
        return Skeleton(config)


def hollow(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], **metadata: str) -> Path:
    """A file of these types and shapes: its header, and a hole for its values."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def full_size_file(path: Path, kind: str = "F8_E4M3") -> Path:
    """All layers of attention and MLPs in one type, the rest in bf16."""
    tensors = {}
    for name, tensor in skeleton().named_parameters():
        is_matrix = name.startswith("transformer_blocks.") and tensor.ndim == 2
        is_coded = is_matrix and not is_modulation(name.removesuffix(".weight"))
        tensors[name] = (kind if is_coded else "BF16", tuple(tensor.shape))
    return hollow(path, tensors)


def full_size_int4(path: Path) -> Path:
    """As nunchaku has them, of rank 32."""
    names = {torch.int8: "I8", torch.int32: "I32", torch.bfloat16: "BF16"}
    parts = Names.of(skeleton())._expected(32)
    tensors = {name: (names[types[0]], shapes[0]) for name, (shapes, types) in parts.items()}
    config = json.dumps(configs_of(CATALOG["edit-2509"])["transformer"])
    known = json.dumps(QUANTISATION | {"rank": 32})
    return hollow(path, tensors, config=config, quantization_config=known)


def judge(given: Facts) -> tuple[list[Finding], Forecast]:
    """As `doctor.look` puts it together."""
    assert given.settings is not None
    entry = CATALOG[given.settings.model]
    known, opened = look_at_files(given.settings, entry)
    seen = forecast(given.settings, entry, given.card, given.host, opened)
    given = dataclasses.replace(
        given, checkpoint=known.get("transformer"), text_encoder=known.get("text_encoder")
    )
    return findings(given, seen), seen


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(full_size_file(tmp_path_factory.mktemp("full") / "anything.bin"))


def test_what_is_here_is_recognised_and_planned_for(fp8: str) -> None:
    env = {"MODEL": "edit-2509", "CHECKPOINT": fp8, **NO_LORA}
    found, seen = judge(facts(MIDDLE, **env))
    assert not problems(found)
    said = about(found, "checkpoint")
    assert said.startswith("ok anything.bin is here: FP8 without scales, 27.")
    assert said.endswith("with no Lightning in it")
    assert "edit-2509 in a transformer in FP8 without scales, the rest in " in about(found, "model")
    assert "16.8 GB are to be downloaded" in about(found, "model files"), "not the transformer"
    assert {row.products for row in seen.rows} == {"fp8"}, "by the file, not by PRECISION_MODE"
    peaks = {row.precision: row.peak for row in seen.rows}
    _, ours = judge_without(MIDDLE)
    plain = {row.precision: row.peak for row in ours.rows}
    assert peaks["fp8"] == pytest.approx(plain["fp8"], rel=0.01)
    assert peaks["4bit"] is not None and plain["4bit"] < peaks["4bit"] < plain["fp8"]
    text = doctor.as_text(found, seen)
    assert "edit-2509 on this card, its transformer in FP8 without scales, the rest in:" in text
    assert "measured on one" not in text


def judge_without(kind: Any) -> tuple[list[Finding], Any]:
    given = facts(kind, MODEL="edit-2509")
    seen = forecast(given.settings, CATALOG["edit-2509"], given.card, given.host)  # type: ignore[arg-type]
    return findings(given, seen), seen


@pytest.mark.parametrize(("name", "like"), [("int4", "svdq"), ("fp8", "fp8")])
def test_before_it_is_here_memory_is_what_it_will_be(
    name: str, like: str, fp8: str, tmp_path: Path
) -> None:
    path = fp8 if name == "fp8" else str(full_size_int4(tmp_path / "int4"))
    env = {"MODEL": "edit-2509", "MODEL_DIR": str(tmp_path), **NO_LORA}
    _, there = judge(facts(MIDDLE, CHECKPOINT=path, **env))
    found, before = judge(facts(MIDDLE, CHECKPOINT=FP8 if name == "fp8" else INT4, **env))
    assert f"memory is forecast for weights like {like}" in about(found, "checkpoint")
    assert "GB are to be downloaded beside CHECKPOINT's file" in about(found, "model files")
    assert before.chosen and before.chosen.peak and there.chosen
    assert before.chosen.peak == pytest.approx(there.chosen.peak, rel=0.01)
    assert [row.products for row in before.rows] == [row.products for row in there.rows]
    assert [row.places for row in before.rows] == [row.places for row in there.rows]


def test_a_card_that_cannot_compute_as_asked(fp8: str) -> None:
    env = {"MODEL": "edit-2509", "CHECKPOINT": fp8, **NO_LORA}
    found, seen = judge(facts(SMALL, **env))
    assert {row.products for row in seen.rows} == {"bf16"} and not problems(found)
    found, _ = judge(facts(SMALL, **env, COMPUTE="fp8"))
    assert "COMPUTE=fp8 is impossible with fp8 weights" in problems(found)[0]


def test_16_bits_are_stored_as_settings_say(tmp_path: Path) -> None:
    path = full_size_file(tmp_path / "x", "BF16")
    found, seen = judge(facts(LARGE, MODEL="edit-2509", CHECKPOINT=str(path)))
    assert "x is here: 16 bits or more, 40.9 GB" in about(found, "checkpoint")
    assert seen.label is None and seen.rows == judge_without(LARGE)[1].rows


def test_what_is_decoded_is_stored_as_settings_say(fp8: str, tmp_path: Path) -> None:
    decoded = {"MODEL": "edit-2509", "CHECKPOINT_DECODE": "1"}
    expected = judge_without(LARGE)[1].rows
    found, seen = judge(facts(LARGE, **decoded, CHECKPOINT=fp8))
    assert re.search("is here: FP8 without scales, decoded, ", about(found, "checkpoint"))
    assert seen.label is None and seen.rows == expected and not problems(found)
    coming = {"MODEL_DIR": str(tmp_path), "CHECKPOINT": INT4, **decoded}
    found, seen = judge(facts(LARGE, **coming))
    assert "memory is forecast for the model's own weights" in about(found, "checkpoint")
    assert seen.rows == expected
    wide = full_size_file(tmp_path / "x", "BF16")
    found, _ = judge(facts(LARGE, **decoded, CHECKPOINT=str(wide)))
    assert "CHECKPOINT_DECODE=1 has no meaning with x" in problems(found)[0]


@pytest.mark.parametrize(
    ("env", "status", "said"),
    [
        ({"CHECKPOINT": INT4}, "note", "published for edit-2509, with Lightning for 4 steps in it"),
        ({"CHECKPOINT": GGUF}, "note", "for edit-2509, with no Lightning in it"),
        ({"CHECKPOINT": INT4, "CHECKPOINT_LIGHTNING": "0"}, "note", "with no Lightning in it"),
        ({"CHECKPOINT": "me/mine:x"}, "note", "not among the files that are known"),
        ({"CHECKPOINT": "https://a.example/x?key=s3"}, "note", "https://a.example/x is to be"),
        ({"CHECKPOINT": "me/mine:x", "LOCAL_ONLY": "1"}, "problem", "LOCAL_ONLY=1 forbids"),
        ({"CHECKPOINT": INT4, "LIGHTNING_STEPS": "8"}, "problem", "LIGHTNING_STEPS=8, and Light"),
        ({"CHECKPOINT": INT4, **NO_LORA}, "problem", "USE_LIGHTNING_LORA=0, and Lightning for 4"),
    ],
)
def test_what_is_not_here_yet(env: dict[str, str], status: str, said: str, tmp_path: Path) -> None:
    found, _ = judge(facts(MIDDLE, MODEL="edit-2509", MODEL_DIR=str(tmp_path), **env))
    lines = about(found, "checkpoint").splitlines()
    assert any(line.startswith(status) and said in line for line in lines), lines
    assert bool(problems(found)) == (status == "problem" or "LOCAL_ONLY" in env)
    assert "s3" not in "\n".join(lines)
    assert not list(tmp_path.iterdir())


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def gguf_with_lightning(path: Path) -> Path:
    tensors = {
        name: (tensor.float().numpy(), "Q8_0" if tensor.ndim == 2 else "F32")
        for name, tensor in weights().items()
    }
    return ggml.write(path, tensors, entries={"general.name": "x-lightning-4steps"})


def file(name: str, path: Path) -> str:
    """Of the miniature, which no start takes as it is set up."""
    whole = weights()
    if name == "told":
        return str(gguf_with_lightning(path))
    changed = {
        "fp8": quantised,
        "missing": lambda tensors: without(tensors, "proj_out.bias"),
        "more": lambda tensors: tensors | {"more.weight": torch.zeros(2)},
        "shape": lambda tensors: tensors | {"proj_out.bias": torch.zeros(3)},
    }
    return str(saved(changed[name](whole), path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "1 faults, the first: proj_out.bias is missing"),
        ("more", "1 faults, the first: more.weight is not known"),
        ("shape", r"proj_out.bias is \(3,\), expected"),
        ("told", "says that Lightning for 4 steps is merged in it"),
    ],
)
def test_what_a_start_refuses_is_a_problem(name: str, said: str, tmp_path: Path) -> None:
    path = file(name, tmp_path / name)
    found, _ = judge(facts(MODEL="mini", CHECKPOINT=path))
    [problem] = problems(found)
    assert re.search(said, problem)
    with pytest.raises(WorkerError):
        build_mini(checkpoint=path)


@pytest.mark.parametrize(
    ("name", "env"), [("fp8", NO_LORA), ("told", {"CHECKPOINT_LIGHTNING": "4"})]
)
def test_what_a_start_takes_is_none(name: str, env: dict[str, str], tmp_path: Path) -> None:
    path = file(name, tmp_path / name)
    found, seen = judge(facts(MODEL="mini", CHECKPOINT=path, **env))
    assert not problems(found) and not seen.rows
    assert about(found, "checkpoint").startswith(f"ok {name} is here")
    build_mini(checkpoint=path, **{variable.lower(): value for variable, value in env.items()})


def test_from_start_to_end(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("CHECKPOINT", file("told", tmp_path / "told"))
    monkeypatch.setattr("sys.argv", ["image_worker", "doctor"])
    assert command.main() == 1
    said = capsys.readouterr().out
    assert "problem  checkpoint: told says that Lightning for 4 steps is merged in it" in said
    monkeypatch.setenv("CHECKPOINT", file("fp8", tmp_path / "fp8"))
    assert command.main() == 0
    assert "ok       checkpoint: fp8 is here" in capsys.readouterr().out
    monkeypatch.setenv("LORA_DIR", str(tmp_path / "none"))
    assert command.main() == 1
    assert "problem  settings: LORA_DIR=" in capsys.readouterr().out
