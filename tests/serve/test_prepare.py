"""`python -m image_worker prepare`, on the miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from image_worker import __main__ as command
from image_worker import catalog
from image_worker.model import prepared
from image_worker.serve.prepare import prepare
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.model.cached_model import ENTRY, put_all, weights_in
from tests.worker_jobs import job


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


@pytest.fixture
def cached(monkeypatch: Any, tmp_path: Path) -> Path:
    """The miniature in MODEL_DIR, as it would be from the hub."""
    monkeypatch.setitem(cast(Any, catalog.CATALOG), "mini", ENTRY)
    (tmp_path / "models").mkdir()
    put_all(tmp_path / "models")
    return tmp_path / "models"


def test_without_its_checkpoint_the_next_start_works(
    cached: Path, monkeypatch: Any, capsys: Any
) -> None:
    size = sum(path.stat().st_size for path in weights_in(cached))
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare", "--whole", "--drop-checkpoint"])
    assert command.main() == 0
    assert f"{size / 1e9:.2f} GB" in capsys.readouterr().out
    assert weights_in(cached) == []
    monkeypatch.setenv("LOCAL_ONLY", "1")
    monkeypatch.setenv("KEEP_PREPARED", "1")
    worker = Worker.from_settings(Settings.from_env())
    assert "images" in worker.run_blocking(job(num_inference_steps=3))
    worker.close()
    assert "prepare" not in [step.name for step in worker.model.cold_start.steps]
    assert command.main() == 0
    assert "0.00 GB" in capsys.readouterr().out


def test_what_is_damaged_stands_for_no_checkpoint(
    cached: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare", "--whole"])
    assert command.main() == 0
    before = weights_in(cached)
    path = next(cached.glob("prepared/*-whole/modulation/norm_out.linear.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare", "--whole", "--drop-checkpoint"])
    assert command.main() == 2
    assert "modulation/norm_out.linear.safetensors" in capsys.readouterr().err
    assert weights_in(cached) == before
    assert command.main() == 0, "it is made again"
    assert weights_in(cached) == []


def test_nothing_is_begun_where_nothing_may_be_removed(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare", "--whole", "--drop-checkpoint"])
    assert command.main() == 2
    assert "local folder" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_only_whole_ones_stand_for_a_checkpoint(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["image_worker", "prepare", "--drop-checkpoint"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "--whole" in capsys.readouterr().err


def test_another_command_is_refused(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["image_worker", "serve"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "prepare" in capsys.readouterr().err


def test_whole_has_no_meaning_with_a_checkpoint(monkeypatch: Any, capsys: Any) -> None:
    """Whose layers each start reads: the model's own files may not go."""
    monkeypatch.setenv("CHECKPOINT", "me/mine:file.gguf")
    assert prepare(whole=True, drop=True) == 2
    assert "KEEP_PREPARED=whole has no meaning with CHECKPOINT" in capsys.readouterr().err
