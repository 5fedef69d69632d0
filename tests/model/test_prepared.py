"""Prepared weights: the same picture, whatever happens to the files or to who writes them."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from image_worker.model import lease, prepared
from image_worker.model.packed import slots
from image_worker.model.prepared import MANIFEST, Prepared
from tests.conftest import MINI_FOLDER, build_mini
from tests.model.damaged import damage
from tests.worker_jobs import job

pytestmark = pytest.mark.long

KILLS = 50  # moments at which a writer is killed
DAMAGES = ("missing", "cut off", "header", "middle", "last")
COMPONENTS = ("text_encoder", "transformer", "vae")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: Any) -> None:
    monkeypatch.setattr(prepared, "CHUNK", 20_000)


def build(folder: Path, **variables: str) -> Any:
    return build_mini(torch.bfloat16, model_dir=str(folder), keep_prepared="1", **variables)


def folder_of(model_dir: Path) -> Path:
    [found] = [path for path in (model_dir / "prepared").iterdir() if path.name[0] != "."]
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(model: Any, other: Any) -> None:
    for name in COMPONENTS:
        pairs = zip(slots(getattr(model, name)), slots(getattr(other, name)), strict=True)
        for one, two in pairs:
            assert one.name == two.name
            assert torch.equal(one.tensor, two.tensor), f"{name}: {one.name}"


def edit(**variables: str) -> tuple[str, Any]:
    """A picture by a whole worker, and its model."""
    from image_worker.settings import Settings
    from image_worker.worker import Worker

    env = {name.upper(): value for name, value in variables.items()}
    worker = Worker.from_settings(Settings.from_env(env | {"MODEL": "mini"}))
    reply = worker.run_blocking(job(seed=3))
    worker.close()
    return reply["images"][0], worker.model


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("bf16", "auto"), ("fp8", "fp8"), ("4bit", "auto"), ("4bit", "int8"), ("svdq", "fp8")],
)
def test_the_second_start_makes_the_same_picture(
    precision: str, compute: str, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    """Which needs no bitsandbytes: its import takes seconds."""
    variables = {
        "precision_mode": precision,
        "compute": compute,
        "embed_metadata": "0",
        "model_dir": str(tmp_path),
    }
    first, _ = edit(keep_prepared="1", **variables)
    written = contents(folder_of(tmp_path))
    for name in ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error now
    second, model = edit(keep_prepared="1", **variables)
    assert first == second
    assert contents(folder_of(tmp_path)) == written
    assert "damaged" not in caplog.text
    steps = [step.name for step in model.cold_start.steps]
    assert "prepare" not in steps
    transformer = model.transformer
    buffers = {slot.tensor.untyped_storage().data_ptr() for slot in slots(transformer.blocks[0])}
    assert len(buffers) == 1, "a block is one run of bytes"


def test_the_usual_schedules_modulation_is_there(tmp_path: Path, monkeypatch: Any) -> None:
    edit(keep_prepared="1", model_dir=str(tmp_path))
    from image_worker.model.weights import Layers

    stock, read = Layers.__call__, []

    def note(self: Any, path: str) -> Any:
        read.append(path)
        return stock(self, path)

    monkeypatch.setattr(Layers, "__call__", note)
    edit(keep_prepared="1", model_dir=str(tmp_path))
    assert read == []
    edit(keep_prepared="0", model_dir=str(tmp_path))
    assert read, "without them, layers are read"


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("transformer/blocks.03.safetensors", how) for how in DAMAGES),
        ("transformer/rest.safetensors", "middle"),
        ("text_encoder/language_model.layers.01.safetensors", "last"),
        ("vae/rest.safetensors", "missing"),
        *((MANIFEST, how) for how in ("missing", "cut off", "middle")),
    ],
)
def test_damage_is_found_named_and_mended(name: str, how: str, tmp_path: Path, caplog: Any) -> None:
    made = build(tmp_path)
    folder = folder_of(tmp_path)
    whole = contents(folder)
    damage(folder / name, how)
    if name == MANIFEST and how == "middle":
        (folder / name).write_text("{")  # a flipped bit in it may spoil a checksum only
    with caplog.at_level(logging.WARNING):
        again = build(tmp_path)
    assert_same(again, made)
    assert name.rpartition("/")[2] in caplog.text
    assert "will be made again" in caplog.text
    assert contents(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_shapes_the_bytes_shapes_the_key(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MINI_FOLDER, copy)
    variants: list[dict[str, str]] = [
        {},
        {"precision_mode": "4bit"},
        {"precision_mode": "4bit", "compute": "int8"},
        {"precision_mode": "4bit", "quantize_components": "text"},
        {"lightning_steps": "4"},
        {"use_lightning_lora": "0"},
        {"model_id": str(copy)},
    ]
    for count, variables in enumerate(variants, start=1):
        build(tmp_path, **variables)
        assert len(list((tmp_path / "prepared").iterdir())) == count
    os.utime(copy / "vae" / "diffusion_pytorch_model.safetensors")
    build(tmp_path, model_id=str(copy))
    assert len(list((tmp_path / "prepared").iterdir())) == len(variants) + 1


def test_nothing_is_written_where_it_is_not_wanted(tmp_path: Path) -> None:
    for wanted in ("0", "auto"):  # auto: only where there is a card
        build_mini(torch.bfloat16, model_dir=str(tmp_path), keep_prepared=wanted)
    assert not (tmp_path / "prepared").exists()


def test_a_volume_that_cannot_be_written_costs_no_start(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "prepared").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        made = build(tmp_path)
    assert "could not be kept" in caplog.text
    assert_same(made, build_mini(torch.bfloat16))


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: usage)
    with caplog.at_level(logging.WARNING):
        build(tmp_path)
    assert "GiB are needed" in caplog.text
    assert not list((tmp_path / "prepared").iterdir())


def writing(folder: Path, monkeypatch: Any) -> Callable[[], None]:
    """What the first start in `folder` does when it has loaded a model: to be done again."""
    write, given = prepared.write, []
    monkeypatch.setattr(prepared, "write", lambda *arguments: given.append(arguments))
    build(folder)
    monkeypatch.setattr(prepared, "write", write)
    [arguments] = given
    return lambda: assert_that(write(*arguments))


def assert_that(condition: bool) -> None:
    assert condition


def fork(work: Callable[[], None]) -> int:
    """A process that does it, from this one, since importing torch takes longer."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # others did not come along
        work()
        status = 0
    except BaseException:
        traceback.print_exc()  # pytest shows it
    finally:
        os._exit(status)


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: Any) -> None:
    write = writing(tmp_path, monkeypatch)
    usage = shutil.disk_usage("/")._replace(free=2**40)  # the room goes while it is written
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: usage)

    def mount() -> None:
        """A disk of 2 MB, that this process alone sees."""
        libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
        clone_newns, clone_newuser = 0x20000, 0x10000000
        if libc.unshare(clone_newns | clone_newuser):
            os._exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if libc.mount(b"none", str(tmp_path).encode(), b"tmpfs", 0, b"size=2m"):
            os._exit(77)

    def fill() -> None:
        mount()
        with pytest.raises(OSError, match="No space left"):
            write()
        assert list((tmp_path / "prepared").iterdir()) == []

    status = os.waitstatus_to_exitcode(os.waitpid(fork(fill), 0)[1])
    if status == 77:
        pytest.skip("no small disk can be mounted here")
    assert status == 0


def test_a_writer_that_is_killed_harms_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)  # the killed one's lease is over
    expected = build_mini(torch.bfloat16)
    write = writing(tmp_path, monkeypatch)
    moments = []  # before each piece of a file, and before each folder is synced

    def note(work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            moments.append(work)
            if len(moments) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments)

        return noted

    for name in ("digest", "_sync"):
        monkeypatch.setattr(prepared, name, note(getattr(prepared, name)))
    fatal = 0
    write()
    count = len(moments)
    assert count > KILLS
    chance = random.Random(0)
    for number in range(KILLS):
        shutil.rmtree(tmp_path / "prepared")
        moments.clear()
        fatal = chance.randint(1, count)
        assert os.waitpid(fork(write), 0)[1] == signal.SIGKILL
        fatal = 0
        for folder in (tmp_path / "prepared").glob("[!.]*"):
            found = Prepared.find(folder)
            assert found and all((folder / name).exists() for name in found.files)
        if number % 10 == 0:  # the others are judged by what they left
            assert_same(build(tmp_path), expected)
    assert_same(build(tmp_path), expected)
    assert [path.name[0] for path in (tmp_path / "prepared").iterdir()] == ["m"]


def test_two_that_start_at_once(tmp_path: Path) -> None:
    children = [fork(lambda: assert_that(bool(build(tmp_path)))) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    folder = folder_of(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["made_of"]["precision"] == "bf16"
    assert_same(build(tmp_path), build_mini(torch.bfloat16))


def test_nothing_slow_is_imported_before_weights_are_read() -> None:
    slow = ("diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "triton")
    program = f"""
import image_worker.worker, sys
sys.exit(' '.join(name for name in {slow} if name in sys.modules) or None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_manifest_that_says_too_little_is_damage(tmp_path: Path, caplog: Any) -> None:
    made = build(tmp_path)
    path = folder_of(tmp_path) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["vae/rest.safetensors"]["sums"].pop()
    path.write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING):
        assert_same(build(tmp_path), made)
    assert "vae/rest.safetensors is not what was written" in caplog.text


def test_what_was_written_meanwhile_is_not_written_again(tmp_path: Path, monkeypatch: Any) -> None:
    write = writing(tmp_path, monkeypatch)
    write()
    before = {path: path.stat().st_mtime_ns for path in folder_of(tmp_path).rglob("*")}
    write()
    assert before == {path: path.stat().st_mtime_ns for path in folder_of(tmp_path).rglob("*")}
    assert [path.name[0] for path in (tmp_path / "prepared").iterdir()] == ["m"]


def test_a_file_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    def unit(value: float) -> prepared.Unit:
        layer = torch.nn.Linear(3, 2).requires_grad_(False)
        torch.nn.init.constant_(layer.weight, value)
        return prepared.Unit.of(list(slots(layer)))

    folder = tmp_path / "folder"
    prepared.write(folder, {"one/a": unit(1)}, {})
    before = contents(folder)
    other = lease.Lease(tmp_path / ".folder.lease")
    assert other.take()
    prepared.add(folder, "one/b", unit(2))
    assert contents(folder) == before, "another process was at it"
    other.release()
    prepared.add(folder, "one/b", unit(2))
    found = Prepared.find(folder)
    assert found and sorted(found.files) == ["one/a.safetensors", "one/b.safetensors"]
    assert found.open("one/b.safetensors").read("weight").eq(2).all()
    assert found.open("one/a.safetensors").read("weight").eq(1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError):
        prepared.add(tmp_path / "missing", "one/b", unit(2))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
