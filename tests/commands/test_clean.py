"""What `clean` finds and removes, and above all what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_worker import __main__ as command
from image_worker.commands import removable
from image_worker.commands.clean import chosen, in_bytes
from image_worker.commands.fetched import InUse, fetched
from image_worker.commands.removable import Item, checked, made, remove
from image_worker.errors import InvalidSettings
from image_worker.job.loras import OnHub
from image_worker.lora_files import LoraFiles
from image_worker.model.from_url import find_checkpoint
from image_worker.settings import Settings
from tests.model.fake_hub import REPO, Hub, only

KEY = "edit-2509-4bit-0123456789abcdef"
HEX = "0" * 32
SILENCE = 300.0
CHECKPOINT = "checkpoints/models--some--files"
LORA, PRIVATE = "loras/hub/models--some--styles", "loras/hub-token/models--me--mine"


def find(folder: Path, silence: float) -> list[Item]:
    return [*made(folder), *fetched(folder, silence, InUse())]


def put(path: Path, size: int = 1000, age: float = 3600.0) -> Path:
    """A file of so many bytes that was last changed so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    moment = time.time() - age
    os.utime(path, (moment, moment))
    return path


def age(path: Path, seconds: float = 3600.0) -> None:
    """All of a folder is so many seconds old."""
    moment = time.time() - seconds
    for parent, folders, names in os.walk(path, topdown=False):
        for name in (*folders, *names):
            os.utime(Path(parent) / name, (moment, moment), follow_symlinks=False)
    os.utime(path, (moment, moment))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A MODEL_DIR with some of everything."""
    folder = tmp_path / "models"
    made = {"model": "edit-2509", "precision": "4bit"}
    put(folder / "prepared" / KEY / "transformer" / "blocks.00.safetensors")
    put(folder / "prepared" / KEY / "manifest.json").write_text(json.dumps({"made_of": made}))
    put(folder / "prepared" / f".{KEY}.{HEX}.partial" / "vae" / "rest.safetensors")
    put(folder / "prepared" / "mine" / "notes.txt")
    put(folder / "kernels" / "triton" / "ab" / "kernel.cubin")
    put(folder / "kernels" / "cuda" / "cd")
    put(folder / "kernels" / "own" / "kernel.cu")
    blobs = folder / "models--Qwen--Qwen-Image-Edit-2509" / "blobs"
    put(blobs / "whole")
    put(blobs / "cut.incomplete", 500)
    snapshot = blobs.parent / "snapshots" / ("a" * 40) / "vae"
    snapshot.mkdir(parents=True)
    (snapshot / "weights.safetensors").symlink_to(blobs / "whole")
    put(folder / "checkpoints" / HEX[:16] / "model.gguf.incomplete", 700)
    put(folder / "checkpoints" / HEX[:16] / "model.gguf")
    put(folder / "checkpoints" / "mine" / "x.incomplete")
    put(folder / "checkpoints" / "mine.gguf")
    put_in_cache(folder / CHECKPOINT, "one.gguf")
    put(folder / CHECKPOINT / "blobs" / "half.incomplete")
    for name in (f"{HEX}.safetensors", "fetching-x.incomplete", "mine.safetensors"):
        put(folder / "loras" / name)
    put(folder / "loras" / "mine" / f"{HEX}.safetensors")
    put_in_cache(folder / LORA, "style.safetensors")
    put_in_cache(folder / PRIVATE, "style.safetensors")
    put(folder / "generated-images" / "mini_lightning8_20260101-000000.png")
    age(folder)
    return folder


def put_in_cache(repo: Path, name: str) -> Path:
    """A file of a repo, as the hub's caches have it."""
    blob = put(repo / "blobs" / f"{name}-bytes")
    link = repo / "snapshots" / ("b" * 40) / name
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    put(repo / "refs" / "main")
    return link


def kept(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def clean(monkeypatch: Any, folder: Path, *arguments: str) -> int:
    monkeypatch.setenv("MODEL_DIR", str(folder))
    monkeypatch.setattr("sys.argv", ["image_worker", "clean", *arguments])
    return command.main()


OURS = {
    f"prepared/{KEY}/transformer/blocks.00.safetensors",
    f"prepared/{KEY}/manifest.json",
    f"prepared/.{KEY}.{HEX}.partial/vae/rest.safetensors",
    "kernels/triton/ab/kernel.cubin",
    "kernels/cuda/cd",
    "models--Qwen--Qwen-Image-Edit-2509/blobs/cut.incomplete",
    f"checkpoints/{HEX[:16]}/model.gguf.incomplete",
    f"checkpoints/{HEX[:16]}/model.gguf",
    f"{CHECKPOINT}/blobs/one.gguf-bytes",
    f"{CHECKPOINT}/blobs/half.incomplete",
    f"loras/{HEX}.safetensors",
    "loras/fetching-x.incomplete",
    f"{LORA}/blobs/style.safetensors-bytes",
    f"{PRIVATE}/blobs/style.safetensors-bytes",
}


def test_without_yes_it_only_lists(models: Path, monkeypatch: Any, capsys: Any) -> None:
    before = kept(models)
    assert clean(monkeypatch, models) == 0
    assert kept(models) == before
    said = capsys.readouterr().out
    assert f"prepared/{KEY} (edit-2509, 4bit)" in said
    assert "half written" in said and "(Qwen/Qwen-Image-Edit-2509)" in said
    assert "would be free" in said and "--yes" in said


def test_all_that_is_ours_goes_and_nothing_else(
    models: Path, monkeypatch: Any, capsys: Any
) -> None:
    before = kept(models)
    assert before >= OURS
    size = sum((models / name).stat().st_size for name in OURS)
    assert clean(monkeypatch, models, "--yes") == 0
    assert kept(models) == before - OURS
    assert f"{in_bytes(size)} are free now" in capsys.readouterr().out
    assert clean(monkeypatch, models, "--yes") == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["prepared", "kernels", "downloads", "loras", "checkpoints"])
def test_one_kind_alone(kind: str, models: Path, monkeypatch: Any) -> None:
    before = kept(models)
    clean(monkeypatch, models, "--yes", f"--{kind}")
    gone = before - kept(models)
    cut_off = {name for name in OURS if name.endswith(".incomplete")}
    whole = {name for name in OURS - cut_off if name.startswith(f"{kind}/")}
    assert gone == (cut_off if kind == "downloads" else whole)


def test_files_of_the_hub_are_listed_by_their_names(
    models: Path, monkeypatch: Any, capsys: Any
) -> None:
    clean(monkeypatch, models, "--loras", "--checkpoints")
    said = capsys.readouterr().out
    assert "(some/files: one.gguf)" in said and "(some/styles: style.safetensors)" in said
    assert said.count("1.00 kB") == 5 and "5.00 kB would be free" in said


@pytest.mark.parametrize("variable", ["CHECKPOINT", "TEXT_ENCODER_CHECKPOINT"])
@pytest.mark.parametrize("name", ["some/files:one.gguf@" + "b" * 40, "url", "path"])
def test_the_file_that_is_named_stays(
    name: str, variable: str, models: Path, monkeypatch: Any, capsys: Any
) -> None:
    url = "https://a.example/model.gguf"
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    files = {"url": put(models / "checkpoints" / folder / "model.gguf")}
    files["path"] = models / "checkpoints" / HEX[:16] / "model.gguf"
    monkeypatch.setenv(variable, {"url": url, "path": str(files["path"])}.get(name, name))
    before = kept(models)
    clean(monkeypatch, models, "--yes", "--checkpoints")
    left = {path for path in kept(models) if path.startswith("checkpoints/")}
    stays = files.get(name, models / CHECKPOINT / "blobs" / "one.gguf-bytes")
    assert str(stays.relative_to(models)) in left
    assert len(before - kept(models)) == 2, "all others go"
    assert f"stays: {variable} names it" in capsys.readouterr().out


def test_both_files_that_are_named_stay(models: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CHECKPOINT", str(models / "checkpoints" / HEX[:16] / "model.gguf"))
    monkeypatch.setenv("TEXT_ENCODER_CHECKPOINT", "some/files:one.gguf@" + "b" * 40)
    before = kept(models)
    clean(monkeypatch, models, "--yes", "--checkpoints")
    assert kept(models) == before


def test_a_folder_of_loras_stays_wherever_it_is(
    models: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("LORA_DIR", str(models / "loras"))
    before = kept(models)
    clean(monkeypatch, models, "--yes", "--loras", "--downloads")
    gone = {name for name in before - kept(models) if name.startswith("loras/")}
    assert gone == {name for name in OURS if name.startswith("loras/hub")}
    assert capsys.readouterr().out.count("stays: it is in LORA_DIR") == 2


def test_what_was_removed_is_fetched_again(tmp_path: Path, monkeypatch: Any) -> None:
    settings = Settings.from_env({"MODEL_DIR": str(tmp_path), "CHECKPOINT": f"{REPO}:a.gguf"})
    with only(Hub({"a.gguf": b"weights", "b.safetensors": b"style"}), monkeypatch) as hub:
        for _ in range(2):
            assert find_checkpoint(settings).read_bytes() == b"weights"
            lora = LoraFiles(settings).find(OnHub(REPO, "b.safetensors", None))
            assert lora.read_bytes() == b"style"
            age(tmp_path)
            clean(monkeypatch, tmp_path, "--yes")
    assert [name for name, _ in hub.asked] == ["a.gguf", "b.safetensors"] * 2
    assert find(tmp_path, SILENCE) == []


def test_what_is_newer_stays(models: Path, monkeypatch: Any) -> None:
    before = kept(models)
    age(models / "prepared" / KEY, 10 * 86_400)
    clean(monkeypatch, models, "--yes", "--older-than", "9")
    assert before - kept(models) == {name for name in OURS if f"/{KEY}/" in name}
    with pytest.raises(SystemExit):
        clean(monkeypatch, models, "--older-than", "-1")


def test_what_is_being_written_stays(models: Path, monkeypatch: Any, capsys: Any) -> None:
    put(models / "prepared" / f".{KEY}.lease", 0, age=10.0)
    put(models / "models--Qwen--Qwen-Image-Edit-2509" / "blobs" / "now.incomplete", age=10.0)
    before = kept(models)
    clean(monkeypatch, models, "--yes", "--prepared", "--downloads")
    assert before - kept(models) == {name for name in OURS if name.endswith(".incomplete")}
    assert capsys.readouterr().out.count("stays: it is being written") == 3
    put(models / "prepared" / f".{KEY}.lease", 0, age=61.0)  # its writer is dead
    clean(monkeypatch, models, "--yes", "--prepared")
    assert not (models / "prepared" / f".{KEY}.lease").exists()
    assert not (models / "prepared" / KEY).exists()


def test_a_lease_that_is_taken_after_the_list_counts(models: Path) -> None:
    [item] = [item for item in find(models, SILENCE) if item.path.name == KEY]
    put(models / "prepared" / f".{KEY}.lease", 0, age=0.0)
    assert remove(item) == (0, "it is being written")
    assert item.path.exists()


def test_what_changes_after_the_list_stays(models: Path) -> None:
    items = [item for item in find(models, SILENCE) if item.stays is None]
    put(models / "models--Qwen--Qwen-Image-Edit-2509" / "blobs" / "cut.incomplete", age=1.0)
    put(models / "kernels" / "triton" / "ef", age=1.0)
    said = {item.path.name: remove(item) for item in items}
    for name in ("cut.incomplete", "triton"):
        assert said[name] == (0, "it has changed since it was listed")
    assert said["cuda"] == (1000, None)


def test_where_names_cannot_change_nothing_is_half_removed(models: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    [item] = [item for item in find(models, SILENCE) if item.path.name == KEY]
    before = kept(models)
    monkeypatch.setattr(Path, "rename", refuse)
    assert remove(item) == (0, "Read-only file system")
    assert kept(models) == before


def test_links_are_not_followed(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    outside = put(tmp_path / "elsewhere" / "precious.incomplete").parent
    put(outside / "manifest.json")
    other = f"other-4bit-{'1' * 16}"
    (models / "prepared" / other).symlink_to(outside)
    (models / "prepared" / KEY / "link").symlink_to(outside)
    (models / "kernels" / "triton" / "link").symlink_to(outside)
    (models / "models--a--b").mkdir()
    (models / "models--a--b" / "blobs").symlink_to(outside)
    (models / "models--c--d" / "blobs").mkdir(parents=True)
    link = models / "models--c--d" / "blobs" / "x.incomplete"
    link.symlink_to(outside / "precious.incomplete")
    age(models)
    clean(monkeypatch, models, "--yes")
    assert {path.name for path in outside.iterdir()} == {"precious.incomplete", "manifest.json"}
    assert (models / "prepared" / other).is_symlink() and link.is_symlink()
    assert not (models / "prepared" / KEY).exists()


@pytest.mark.parametrize("name", ["prepared", "kernels", "loras", "checkpoints", "loras/hub"])
def test_a_whole_kind_behind_a_link_stays(
    name: str, models: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    away = (models / name).rename(tmp_path / "away")
    (models / name).symlink_to(away)
    before = kept(away)
    clean(monkeypatch, models, "--yes")
    assert kept(away) == before


def test_a_folder_that_became_a_link_after_the_list_stays(models: Path, tmp_path: Path) -> None:
    items = find(models, SILENCE)
    away = (models / "prepared").rename(tmp_path / "away")
    (models / "prepared").symlink_to(away)
    before = kept(away)
    for item in items:
        if item.kind == "prepared":
            assert remove(item)[0] == 0
    assert kept(away) == before


@pytest.mark.parametrize("what", ["/", "home", "above", "gone", "file"])
def test_a_model_dir_that_cannot_be_is_refused(
    what: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    home = tmp_path / "people" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    folder = {
        "/": Path("/"),
        "home": home,
        "above": home.parent,
        "gone": tmp_path / "gone",
        "file": put(tmp_path / "file"),
    }[what]
    monkeypatch.setattr(removable, "remove", None)
    assert clean(monkeypatch, folder, "--yes") == 2
    assert "error: invalid_settings: MODEL_DIR=" in capsys.readouterr().err
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(InvalidSettings):
        checked(link)


def test_read_only_files_are_no_hindrance(models: Path, monkeypatch: Any) -> None:
    (models / "prepared" / KEY / "manifest.json").chmod(0o400)
    assert clean(monkeypatch, models, "--yes") == 0
    assert not (models / "prepared" / KEY).exists()


def test_what_cannot_be_removed_is_said(models: Path, monkeypatch: Any, capsys: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    before = sum((models / name).stat().st_size for name in OURS)
    assert clean(monkeypatch, models, "--yes") == 1
    said = capsys.readouterr().out
    assert "not all of it could be removed" in said and "Permission denied" in said
    assert "0 B are free now" in said
    # Prepared weights have another name then, by which nobody takes them for whole.
    left = [path for path in models.rglob("*") if path.is_file() and path.name != "mine"]
    assert sum(path.stat().st_size for path in left) >= before
    assert not (models / "prepared" / KEY).exists()


def test_what_vanishes_meanwhile_is_no_fault(models: Path) -> None:
    items = find(models, SILENCE)
    for item in items:
        remove(item)
    for item in items:
        assert remove(item) == (0, None)
    assert removable.measure(models / "gone") == (0, 0.0)


def test_a_manifest_that_says_nothing_is_listed_all_the_same(models: Path) -> None:
    for content in ("", "[]", '{"made_of": []}', '{"made_of": {"model": "x"}}', "\0"):
        (models / "prepared" / KEY / "manifest.json").write_text(content)
        [item] = [item for item in find(models, SILENCE) if item.path.name == KEY]
        assert item.about == "without a manifest"


@given(st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1, max_size=60))
def test_other_names_are_never_taken_for_ours(name: str) -> None:
    """Unless they have the key's hash in them."""
    path = Path("/nowhere/prepared") / name
    if not any(character in "0123456789abcdef" for character in name) or len(name) < 16:
        assert removable._about(path) is None


@given(st.floats(0, 1e7), st.floats(0, 100))
def test_the_age_is_in_days(seconds: float, days: float) -> None:
    item = Item("kernels", Path("x"), 1, seconds, "")
    assert (chosen([item], ["kernels"], days) == [item]) == (seconds >= days * 86_400)
    assert chosen([item], ["prepared"], 0) == []
