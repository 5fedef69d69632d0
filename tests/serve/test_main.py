"""The command line: one job here, or a queue; and how it ends when it cannot start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from image_worker.errors import InvalidRequest
from image_worker.serve import command, main
from image_worker.settings import Settings
from tests.worker_jobs import job

ROOT = Path(__file__).parents[2]


def handler(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = ("PATH", "HOME", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return subprocess.run(
        [sys.executable, str(ROOT / "handler.py"), *arguments],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_job_leaves_a_picture_and_says_where(tmp_path: Path) -> None:
    text = (ROOT / "test_input.json").read_text()
    done = handler("--test_input", text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report, _, last = done.stdout.rstrip().rpartition("\n")
    path = tmp_path / last.removeprefix("wrote ")
    assert path.parent == tmp_path / "generated-images"
    assert Image.open(path).size == (128, 128)
    reply = json.loads(report)
    assert reply["model"] == "mini"
    assert "images" not in reply and "output_image_base64" not in reply
    assert "MODEL=auto: serving mini on CPU" in done.stderr


def test_a_bad_job_is_exit_status_1(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """In this process, since another would take ten seconds to import what this one has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setattr(main, "set_up_logging", lambda _: None)
    assert main.main(["--test_input", '{"input": {"prompt": "x"}}']) == 1
    assert json.loads(capsys.readouterr().err)["error"]["field"] == "image"
    assert not (tmp_path / "generated-images").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("--test_input", "{}"), {"LIGHTNING_STEPS": "5"}, "LIGHTNING_STEPS='5' is not valid"),
        (("--test_input", "{"), {}, "not JSON"),
        (("--test_input", "[]"), {}, '"input"'),
        ((), {}, "no test_input.json"),
    ],
)
def test_what_prevents_the_start_is_said_at_once(
    arguments: tuple[str, ...], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = handler(*arguments, cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there_prevents_the_start(tmp_path: Path) -> None:
    variables = {"MODEL": "edit-2509", "LOCAL_ONLY": "1", "MODEL_DIR": str(tmp_path)}
    done = handler("--test_input", '{"input": {}}', cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert "model_unavailable" in done.stderr and "LOCAL_ONLY=1" in done.stderr


@pytest.mark.parametrize(
    ("env", "for_sdk"),
    [
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://queue/?a"}, []),
        ({"STANDALONE_MODE": "1"}, []),
        ({}, ["--rp_serve_api"]),
    ],
)
def test_a_queue_is_served_where_there_is_one(
    env: dict[str, str], for_sdk: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main._local_job(None, Settings.from_env(env), for_sdk) is None


def test_test_input_wins_over_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_input.json").write_text('{"input": 1}')
    settings = Settings.from_env({})
    assert main._local_job(None, settings, []) == {"input": 1}
    assert main._local_job('{"input": 2}', settings, []) == {"input": 2}
    with pytest.raises(InvalidRequest):
        main._local_job('{"prompt": 2}', settings, [])


class _Stub:
    def __init__(self, reply: dict[str, Any]) -> None:
        self.reply = reply

    def run_blocking(self, job: Any, progress: Any = None) -> dict[str, Any]:
        progress(1, 1)
        return self.reply


def test_every_picture_gets_its_own_file(tmp_path: Path, capsys: Any) -> None:
    reply: Any = {"seeds": [1, 2], "images": ["QQ==", "Qg=="], "output_format": "png"}
    assert command.run_one(_Stub(reply), job(), tmp_path) == 0  # type: ignore[arg-type]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"A", b"B"}
    assert capsys.readouterr().out.count("wrote ") == 2


def test_pictures_in_storage_are_not_written(tmp_path: Path, capsys: Any) -> None:
    reply: Any = {"seeds": [1], "image_urls": ["https://a.example/1.png"], "output_format": "png"}
    assert command.run_one(_Stub(reply), job(), tmp_path) == 0  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir()) and "https://a.example/1.png" in capsys.readouterr().out
