"""`python -m image_worker prepare`, on the miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from image_worker import __main__ as command
from image_worker.model import prepared
from image_worker.settings import Settings
from image_worker.worker import Worker


@pytest.fixture(autouse=True)
def _environment(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "models"))
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare"])


def test_a_later_start_reads_what_was_prepared(tmp_path: Path, capsys: Any) -> None:
    assert command.main() == 0
    assert f"prepared in {tmp_path / 'models' / 'prepared'}" in capsys.readouterr().out
    assert len(list((tmp_path / "models" / "prepared").glob("mini-*/manifest.json"))) == 1
    worker = Worker.from_settings(Settings.from_env().model_copy(update={"keep_prepared": "1"}))
    worker.close()
    assert worker.model.cold_start.prepared
    assert "prepare" not in [step.name for step in worker.model.cold_start.steps]


def test_a_bad_setting_is_exit_status_2(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("PRECISION_MODE", "3bit")
    assert command.main() == 2
    assert "error: invalid_settings: PRECISION_MODE='3bit'" in capsys.readouterr().err


def test_what_cannot_be_kept_is_exit_status_2(monkeypatch: Any, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(prepared, "write", full)
    assert command.main() == 2
    assert "could not be kept" in capsys.readouterr().err


def test_another_command_is_refused(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["image_worker", "serve"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "prepare" in capsys.readouterr().err
