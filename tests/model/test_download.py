"""Downloads from a hub that fails in every way: what arrives, what is asked for, what is said."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from image_worker.catalog import CATALOG, HubFile
from image_worker.errors import ModelUnavailable
from image_worker.model import download, files
from image_worker.model.download import Snapshot
from image_worker.model.listing import ListedFile
from image_worker.settings import Settings
from tests.conftest import MINI_FOLDER
from tests.model.fake_hub import COMMIT, LIST, REPO, Fault, Hub, only

KILLS = 50
WEIGHTS = "transformer/model.safetensors"
RANDOM = random.Random(0)
SMALL = {
    WEIGHTS: RANDOM.randbytes(300_000),
    "vae/model.safetensors": RANDOM.randbytes(200_000),
    "vae/config.json": b"{}",
    "tokenizer/config.json": b"{}",  # the same bytes: one blob
    "tokenizer/merges.txt": RANDOM.randbytes(5_000),
    "tokenizer/empty.txt": b"",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only(Hub(dict(SMALL)), monkeypatch) as hub:
        yield hub


def fetch(cache: Path, timeout: float = 20, revision: str = COMMIT) -> Path:
    snapshot = Snapshot(REPO, revision, cache, timeout)
    return snapshot.fetch(snapshot.paths)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def partial_files(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def starts(hub: Hub, path: str = WEIGHTS) -> list[int]:
    return [start for asked, start in hub.asked if asked == path]


def test_all_files_arrive_in_a_cache_that_the_library_reads(hub: Hub, tmp_path: Path) -> None:
    folder = fetch(tmp_path, revision="main")
    assert contents(folder) == SMALL
    found = snapshot_download(REPO, revision="main", cache_dir=tmp_path, local_files_only=True)
    assert Path(found) == folder
    assert not partial_files(tmp_path)
    assert (
        sum(path == "vae/config.json" for path, _ in hub.asked)
        + sum(path == "tokenizer/config.json" for path, _ in hub.asked)
        == 1
    )


def test_what_is_there_is_neither_asked_for_nor_hashed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(ListedFile, "matches", lambda *_: pytest.fail("hashed"))
    fetch(tmp_path)
    assert hub.asked == []


def test_only_what_a_model_needs_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.files = contents(MINI_FOLDER)
    model = {path for path in hub.files if path.split("/")[0] in files._folders(CATALOG["mini"])}
    index = b'{"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}'
    hub.files["transformer/diffusion_pytorch_model.safetensors.index.json"] = index
    model.add("transformer/diffusion_pytorch_model.safetensors.index.json")
    for unneeded in (
        "transformer/other.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "vae/flax_model.msgpack",
        "vae/tf_model.h5",
        "whole.safetensors",
    ):
        hub.files[unneeded] = b"x"
    settings = Settings.from_env({"MODEL_DIR": str(tmp_path), "MODEL_ID": REPO})
    folder = files.find_model(CATALOG["mini"], settings)
    assert {path for path, _ in hub.asked} == model
    assert contents(folder) == {path: hub.files[path] for path in model}
    lists = hub.lists
    assert files.find_model(CATALOG["mini"], settings) == folder
    assert hub.lists == lists


def test_of_a_repo_of_adapters_one_file_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"lora-{kind}.safetensors": kind.encode() for kind in ("fp32", "bf16")}
    settings = Settings.from_env({"MODEL_DIR": str(tmp_path)})
    file = HubFile(REPO, "lora-bf16.safetensors", COMMIT)
    assert files.find_adapter(file, settings).read_bytes() == b"bf16"
    assert {path for path, _ in hub.asked} == {"lora-bf16.safetensors"}
    with pytest.raises(ModelUnavailable, match=r"no lora-8bit\.safetensors on the hub"):
        files.find_adapter(HubFile(REPO, "lora-8bit.safetensors", COMMIT), settings)


@pytest.mark.parametrize("stalls", [False, True])
def test_a_file_that_is_cut_off_continues_where_it_stopped(
    stalls: bool, hub: Hub, tmp_path: Path
) -> None:
    hub.faults[WEIGHTS] = [Fault(after=100_000, stalls=stalls), Fault(after=50_000)]
    assert contents(fetch(tmp_path)) == SMALL
    assert starts(hub) == [0, 100_000, 150_000]


def test_a_download_that_moves_has_no_deadline(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(after=10_000)] * 29
    assert contents(fetch(tmp_path, timeout=0.1)) == SMALL
    assert starts(hub) == list(range(0, 300_000, 10_000))


def test_a_later_process_continues_where_an_earlier_one_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(after=100_000)] + [Fault(status=503)] * 1000
    with pytest.raises(ModelUnavailable, match=WEIGHTS):
        fetch(tmp_path, timeout=0.1)
    (part,) = partial_files(tmp_path)
    assert part.read_bytes() == SMALL[WEIGHTS][:100_000]
    hub.faults.clear()
    hub.asked.clear()
    assert contents(fetch(tmp_path)) == SMALL
    assert starts(hub) == [100_000]


def test_a_server_without_ranges_is_put_up_with(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(after=100_000), Fault(whole=True)]
    assert contents(fetch(tmp_path)) == SMALL


@pytest.mark.parametrize("name", [WEIGHTS, LIST])
def test_what_passes_is_tried_again(name: str, hub: Hub, tmp_path: Path) -> None:
    busy = Fault(status=429, headers={"Retry-After": "0"})
    hub.faults[name] = [Fault(status=500), Fault(status=503), busy, Fault(status=408)]
    assert contents(fetch(tmp_path)) == SMALL
    assert hub.faults[name] == []


def test_the_deadline_names_the_file_and_what_is_wrong(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(status=503)] * 1000
    with pytest.raises(ModelUnavailable) as caught:
        fetch(tmp_path, timeout=0.1)
    for part in (WEIGHTS, REPO, "HTTP 503", "0.1 s", "DOWNLOAD_TIMEOUT"):
        assert part in str(caught.value)
    assert len(starts(hub)) > 2


def test_a_hub_that_asks_for_hours_ends_at_the_deadline(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(status=429, headers={"Retry-After": "7200"})] * 1000
    with pytest.raises(ModelUnavailable, match=r"HTTP 429.*HF_TOKEN"):
        fetch(tmp_path, timeout=0.1)
    assert len(starts(hub)) == 2


def test_a_hub_that_is_not_there_is_said_so(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelUnavailable, match=f"list of files of {REPO}.*cannot be reached"):
        fetch(tmp_path, timeout=0.05)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "HF_TOKEN"),
        (403, "", "HF_TOKEN"),
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "does not exist"),
        (404, "RevisionNotFound", "MODEL_REVISION"),
        (404, "EntryNotFound", "no such file"),
        (416, "", "HTTP 416"),
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, LIST])
def test_what_does_not_pass_is_asked_once(
    name: str, status: int, code: str, said: str, hub: Hub, tmp_path: Path
) -> None:
    hub.faults[name] = [Fault(status=status, headers={"X-Error-Code": code})] * 2
    with pytest.raises(ModelUnavailable, match=said) as caught:
        fetch(tmp_path)
    assert (WEIGHTS if name == WEIGHTS else "list of files") in str(caught.value)
    assert len(hub.faults[name]) == 1


def test_wrong_bytes_are_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(wrong=True)]
    hub.faults["tokenizer/merges.txt"] = [Fault(wrong=True)]  # git's checksum
    assert contents(fetch(tmp_path)) == SMALL
    assert starts(hub) == starts(hub, "tokenizer/merges.txt") == [0, 0]


def test_wrong_bytes_twice_are_an_error_and_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = [Fault(wrong=True)] * 5
    with pytest.raises(ModelUnavailable, match=f"{WEIGHTS}.*checksum"):
        fetch(tmp_path)
    assert starts(hub) == [0, 0]
    assert all(len(SMALL[WEIGHTS]) != p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())


def test_a_file_of_another_size_in_the_cache_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    path = fetch(tmp_path) / WEIGHTS
    with path.open("r+b") as stream:
        stream.truncate(10)
    assert contents(fetch(tmp_path)) == SMALL


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    size = sum(map(len, SMALL.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 3))
    with pytest.raises(ModelUnavailable, match=r"needs 0\.00 GB more.*0\.00 GB free") as caught:
        fetch(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert hub.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 2))
    assert contents(fetch(tmp_path)) == SMALL  # one of the two equal files is not needed


def test_room_is_needed_only_for_what_is_not_there_yet(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[WEIGHTS] = [Fault(after=100_000), Fault(status=404)]
    with pytest.raises(ModelUnavailable):
        fetch(tmp_path)
    for path in SMALL:
        if path != WEIGHTS:
            Snapshot(REPO, COMMIT, tmp_path, 20).fetch([path])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    assert contents(fetch(tmp_path)) == SMALL


def test_room_that_cannot_be_known_is_warned_of(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(_: Path) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    assert contents(fetch(tmp_path)) == SMALL
    assert "no such call" in caplog.text


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, "no room"), (errno.EDQUOT, "no room"), (errno.EROFS, "cannot be written")],
)
def test_a_disk_that_refuses_ends_it_at_once(
    code: int, said: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any, progress: Any, file: ListedFile, part: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Snapshot, "_receive", refuse)
    with pytest.raises(ModelUnavailable, match=rf"of {REPO}.*{said}"):
        fetch(tmp_path)


def test_a_folder_is_complete_only_with_its_last_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = download._create_symlink
    monkeypatch.setattr(
        download, "_create_symlink", lambda *a, **o: (made.append(a[1]), make(*a, **o))
    )
    fetch(tmp_path)
    assert [path.endswith("safetensors") for path in made] == [False] * 4 + [True] * 2


def test_workers_that_share_a_cache_fetch_each_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause, hub.piece = 0.002, 2**13
    workers = [threading.Thread(target=fetch, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert contents(fetch(tmp_path)) == SMALL
    assert len(hub.asked) == len({content for content in SMALL.values() if content})


def test_how_far_it_is_goes_to_the_log(hub: Hub, tmp_path: Path, caplog: Any) -> None:
    hub.files["large.safetensors"] = bytes(20_000_000)
    with caplog.at_level(logging.INFO):
        fetch(tmp_path)
    assert f"{REPO}@{COMMIT}: 0.02 of 0.02 GB" in caplog.text


# Forks a child per line that it is given, which fetches everything; tells its id, then its end.
FORKS = f"""
import os, sys
from pathlib import Path
from image_worker.model import download, retrying
download.WRITE, retrying.FIRST_WAIT = 4096, 0.01
for line in sys.stdin:
    if not (child := os.fork()):
        snapshot = download.Snapshot({REPO!r}, {COMMIT!r}, Path(line.strip()), 20)
        snapshot.fetch(snapshot.paths)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_moment_it_ends_with_the_right_files(hub: Hub, tmp_path: Path) -> None:
    moments = random.Random(1)
    hub.piece, hub.pause = 2**12, 0.0005
    environment = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as forks:
        assert forks.stdin and forks.stdout
        killed = caches = 0
        while killed < KILLS:
            forks.stdin.write(f"{tmp_path / str(caches)}\n")
            forks.stdin.flush()
            child, until = int(forks.stdout.readline()), hub.pieces + moments.randrange(1, 80)
            with hub.lock:
                hub.lock.wait_for(lambda until=until: hub.pieces >= until, timeout=0.5)
            time.sleep(moments.uniform(0, 0.003))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            was_killed = int(forks.stdout.readline()) == signal.SIGKILL
            killed += was_killed
            caches += not was_killed or killed % 3 == 0  # what it left is finished below
        forks.stdin.close()
    assert [start for _, start in hub.asked if start]
    for cache in tmp_path.iterdir():
        assert contents(fetch(cache)) == SMALL
        assert not partial_files(cache)
