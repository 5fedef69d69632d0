"""`python -m image_worker calibrate`: from jobs to a file of activation ranges."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from image_worker import __main__ as command
from image_worker.commands.calibrate import for_recording
from image_worker.model import ranges
from image_worker.model.in_folder import read_json
from image_worker.serve import main, process
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import MINI, MINI_FOLDER
from tests.worker_jobs import job

CONFIG = read_json(MINI_FOLDER / "transformer" / "config.json")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    monkeypatch.setattr(main, "set_up_logging", lambda _: None)
    monkeypatch.setattr(process, "prepare_process", lambda: None)


def call(monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["image_worker", "calibrate", *arguments])
    return command.main()


def write(name: str, content: Any) -> None:
    Path(name).write_text(json.dumps(content))


@pytest.mark.parametrize("precision", ["bf16", "4bit"])
def test_jobs_become_ranges_that_a_start_takes(
    precision: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nearly the same, whatever the weights are in, and near those of the package."""
    monkeypatch.setenv("PRECISION_MODE", precision)
    write("one.json", job(seed=1))
    write("more.json", [job(seed=2), job(seed=3, prompt="remove the blue square")])
    assert call(monkeypatch, "one.json", "more.json", "-o", "ranges.safetensors") == 0
    said = capsys.readouterr().out
    assert (
        f"layers: 84, of which 3 read nothing; jobs: 3; forwards: 6; weights: {precision}\n" in said
    )
    found = ranges.of_file(Path("ranges.safetensors"), CONFIG)
    ours = ranges.of_file(MINI.ranges, CONFIG)
    name = "transformer_blocks.0.attn.to_q"
    near = torch.nn.functional.cosine_similarity(found.layers[name], ours.layers[name], dim=0)
    assert near > 0.95
    assert not list(Path().glob("prepared")) and not list(Path().glob(".*"))


def test_it_records_what_is_not_rounded() -> None:
    env = {"PRECISION_MODE": "svdq", "COMPUTE": "fp8", "SVDQ_RANGES": "to-be-written.safetensors"}
    found = for_recording(Settings.from_env(env))
    assert (found.compute, found.keep_prepared, found.svdq_ranges) == ("bf16", "0", None)
    assert for_recording(Settings.from_env(env | {"KEEP_PREPARED": "1"})).keep_prepared == "1"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "has no jobs"),
        ('[{"input": {"prompt": "x"}}, 5]', "job 2 is no JSON object"),
        ('{"prompt": "x"}', "job 1 is no JSON object"),
        ('{"input": {"prompt": "x", "sed": 1}}', "jobs.json, job 1: .*sed"),
        (None, "cannot be read"),
    ],
)
def test_wrong_jobs_are_named_before_the_start(
    content: str | None, complaint: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Worker, "from_settings", lambda _: pytest.fail("it started"))
    if content is not None:
        Path("jobs.json").write_text(content)
    assert call(monkeypatch, "jobs.json", "-o", "ranges.safetensors") == 1
    assert re.search(complaint, capsys.readouterr().err)


@pytest.mark.parametrize("target", ["ranges.json", "nowhere/ranges.safetensors"])
def test_a_place_that_cannot_be_is_named_before_the_start(
    target: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Worker, "from_settings", lambda _: pytest.fail("it started"))
    write("jobs.json", job())
    assert call(monkeypatch, "jobs.json", "-o", target) == 1
    assert target in capsys.readouterr().err


def test_a_job_that_fails_leaves_no_file(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write("jobs.json", [job(), job(image_base64="bm8gcGljdHVyZQ==")])
    assert call(monkeypatch, "jobs.json", "-o", "ranges.safetensors") == 1
    assert "jobs.json, job 2: invalid_image" in capsys.readouterr().err
    assert not Path("ranges.safetensors").exists()
