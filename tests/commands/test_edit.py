"""`python -m image_worker edit`: from files to a file."""

from __future__ import annotations

import argparse
import base64
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from image_worker import __main__ as command
from image_worker.catalog import CATALOG
from image_worker.commands import edit
from image_worker.errors import DoesNotFit, InvalidImage, InvalidRequest
from image_worker.job.request import EditRequest
from image_worker.serve import main, process
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import make_picture


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "mini")
    monkeypatch.setattr(main, "set_up_logging", lambda _: None)
    monkeypatch.setattr(process, "prepare_process", lambda: None)
    for name in ("scene.png", "other.jpg"):
        make_picture().save(tmp_path / name)


class _Stub:
    """Answers any job with a picture of one byte, and keeps it."""

    def __init__(self, lightning: int | None = 8) -> None:
        self.model = SimpleNamespace(lightning_steps=lightning)
        self.jobs: list[Any] = []
        self.reply: dict[str, Any] = {}
        self.settings: Any = None

    def run_blocking(self, job: Any, progress: Any) -> dict[str, Any]:
        self.jobs.append(job)
        progress(1, 1)
        wanted = job["input"]
        return {
            "images": ["QQ=="],
            "seed": wanted.get("seed", 5),
            "num_inference_steps": wanted.get("num_inference_steps", 8),
            "width": 128,
            "height": 128,
            "model": "mini",
            "output_format": wanted["output_format"],
            "timings": {"total": 1.5},
            "warnings": ["unusual"],
        } | self.reply

    def close(self) -> None:
        self.jobs.append("closed")


@pytest.fixture
def stub(monkeypatch: Any) -> _Stub:
    found = _Stub()

    def start(settings: Settings) -> _Stub:
        found.settings = settings
        return found

    monkeypatch.setattr(Worker, "from_settings", start)
    return found


def call(monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["image_worker", "edit", *arguments])
    return command.main()


def test_one_edit_on_the_miniature(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_STEPS", "4")
    assert call(monkeypatch, "scene.png", "--seed", "7", "make the red circle blue") == 0
    *_, about, path = capsys.readouterr().out.splitlines()
    assert about.startswith("128x128, 4 steps, seed 7, ")
    assert path.startswith("generated-images/mini_lightning4_2") and path.endswith(".png")
    with Image.open(path) as picture:
        assert picture.size == (128, 128) and picture.text["seed"] == "7"  # type: ignore[attr-defined]


def test_options_become_the_job(monkeypatch: Any, stub: _Stub, capsys: Any) -> None:
    given = ("scene.png", "--steps", "3", "--size", "256x192", "other.jpg", "--seed", "9", "snow")
    assert call(monkeypatch, *given, "-o", "made/new/out.webp") == 0
    wanted, closed = stub.jobs
    assert closed == "closed"
    request = EditRequest.parse(wanted["input"], CATALOG["mini"])
    assert (request.prompt, request.seed, request.num_inference_steps) == ("snow", 9, 3)
    assert (request.width, request.height, request.output_format) == (256, 192, "webp")
    sent = [base64.b64decode(source.base64 or "") for _, source in request.sources]
    assert sent == [Path(name).read_bytes() for name in ("scene.png", "other.jpg")]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "made/new/out.webp"
    assert "note: unusual" in said.err
    assert Path("made/new/out.webp").read_bytes() == b"A"


def test_nothing_is_overwritten(monkeypatch: Any, stub: _Stub, capsys: Any) -> None:
    for _ in range(3):
        assert call(monkeypatch, "scene.png", "snow", "-o", "other.jpg") == 0
    paths = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".jpg")]
    assert paths == ["other-2.jpg", "other-3.jpg", "other-4.jpg"]
    with Image.open("other.jpg") as picture:
        assert picture.size == (128, 128)


@pytest.mark.parametrize(
    ("lightning", "steps", "name"),
    [(4, 4, "lightning4"), (8, 3, "lightning8-in-3"), (None, 40, "euler40")],
)
def test_a_name_tells_how_it_was_made(lightning: int | None, steps: int, name: str) -> None:
    reply = {"model": "edit-2509", "num_inference_steps": steps, "output_format": "jpeg"}
    found = edit.name_of(_Stub(lightning), reply)  # type: ignore[arg-type]
    assert found.startswith(f"edit-2509_{name}_2") and found.endswith(".jpeg")


def test_a_model_that_makes_pictures_from_text_takes_no_file(
    monkeypatch: Any, stub: _Stub, capsys: Any
) -> None:
    monkeypatch.setenv("MODEL", "image")
    assert call(monkeypatch, "a castle") == 0
    assert "images" not in stub.jobs[0]["input"]
    assert call(monkeypatch, "scene.png", "a castle") == 1
    assert "image takes no picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone.png", "snow"), "invalid_image: gone.png is not there"),
        ((".", "snow"), "invalid_image: . is a folder"),
        (("/dev/null", "snow"), "invalid_image: /dev/null is no file"),
        (("a\0b", "snow"), "invalid_image: "),
        (("text.png", "snow"), "invalid_image: text.png: the picture cannot be read"),
        (("cut.png", "snow"), "invalid_image: cut.png: the picture cannot be read"),
        (("empty.png", "snow"), "invalid_image: empty.png: "),
        (("huge.png", "snow"), "invalid_image: huge.png is over 20 MiB"),
        (("scene.png",), "invalid_request: the last argument is what to do, and scene.png"),
        (("snow", "scene.png"), "invalid_request: the last argument is what to do"),
        (("snow",), "invalid_request: mini edits pictures: name one"),
        (("scene.png", ""), "invalid_request: prompt: "),
        (("scene.png", "snow", "--size", "100x100"), "invalid_request: width: "),
        (("scene.png", "snow", "--steps", "0"), "invalid_request: num_inference_steps: "),
        (("scene.png", "snow", "--seed", "-1"), "invalid_request: seed: "),
        (("scene.png", "snow", "-o", "out.tiff"), "invalid_request: --output out.tiff"),
        (("scene.png", "snow", "-o", "x.jpg", "--format", "png"), "is no name for png"),
        (("scene.png", "snow", "-o", "."), "--output . is a folder"),
        (("scene.png",) * 5 + ("snow",), "invalid_request: images: "),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    arguments: tuple[str, ...], message: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(Worker, "from_settings", None)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "scene.png").read_bytes()[:-2000])
    with (tmp_path / "huge.png").open("wb") as stream:
        stream.truncate(21 * 2**20)
    assert call(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert f"error: {message}" in said.err or message in said.err
    assert said.err.count("\n") == 1 and not said.out
    assert not Path("generated-images").exists()


def test_a_job_that_fails_is_one_typed_line(monkeypatch: Any, stub: _Stub, capsys: Any) -> None:
    stub.reply = {"error": {"type": "out_of_memory", "message": "too large"}}
    assert call(monkeypatch, "scene.png", "snow") == 1
    assert capsys.readouterr().err.endswith("error: out_of_memory: too large\n")
    assert stub.jobs[-1] == "closed"


def test_a_start_that_fails_is_exit_status_2(monkeypatch: Any, capsys: Any) -> None:
    def small(_: Settings) -> None:
        raise DoesNotFit("the card is too small")

    monkeypatch.setattr(Worker, "from_settings", small)
    assert call(monkeypatch, "scene.png", "snow") == 2
    assert "error: does_not_fit: the card is too small" in capsys.readouterr().err
    monkeypatch.setenv("LIGHTNING_STEPS", "3")
    assert call(monkeypatch, "scene.png", "snow") == 2
    assert "error: invalid_settings: LIGHTNING_STEPS" in capsys.readouterr().err


def test_an_unforeseen_end_of_the_start_is_logged(monkeypatch: Any, caplog: Any) -> None:
    def breaks(_: Settings) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Worker, "from_settings", breaks)
    with caplog.at_level(logging.ERROR):
        assert call(monkeypatch, "scene.png", "snow") == 2
    assert "the worker could not start" in caplog.text


def test_a_picture_that_cannot_be_written_is_exit_status_1(
    monkeypatch: Any, stub: _Stub, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert call(monkeypatch, "scene.png", "snow", "-o", "file/out.png") == 1
    assert "error: the picture cannot be written to file/out.png" in capsys.readouterr().err


def test_neither_storage_nor_queue_matter(monkeypatch: Any, stub: _Stub) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://s3.example/bucket")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://queue")
    assert call(monkeypatch, "scene.png", "snow") == 0
    assert stub.settings.bucket_endpoint_url is None
    assert stub.settings.runpod_webhook_get_job is None


@pytest.mark.parametrize("arguments", [("scene.png", "snow", "--stepz", "3"), (), ("--size", "12")])
def test_options_that_do_not_exist_are_refused(arguments: Any, monkeypatch: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, *arguments)


def test_a_name_without_an_ending_gets_one() -> None:
    options = argparse.Namespace(output="made/out", format="webp")
    assert edit.target_of(options) == Path("made/out.webp")


def test_a_file_that_cannot_be_read_is_said(monkeypatch: Any, tmp_path: Path) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InvalidImage, match=r"scene\.png cannot be read: Permission denied"):
        edit.read_picture(tmp_path / "scene.png")


def test_a_long_instruction_is_no_file() -> None:
    options = argparse.Namespace(
        given=["x" * 5000], seed=None, steps=None, size=None, output=None, format=None
    )
    assert edit.job_of(options)["input"]["prompt"] == "x" * 5000
    options.given = ["scene.png"]
    with pytest.raises(InvalidRequest):
        edit.job_of(options)
