"""LoRAs that jobs name, from the request to the picture, on the miniature."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from image_worker import lora_files
from image_worker import loras as loras_module
from image_worker.edit import conditions
from image_worker.edit.batching import Limits
from image_worker.edit.denoise import Picture, start, step
from image_worker.edit.fitting import check_fits
from image_worker.errors import (
    InvalidLora,
    InvalidSettings,
    LoraUnavailable,
    ModelUnavailable,
    OutOfMemory,
)
from image_worker.job.request import LoraOption
from image_worker.loras import Loras
from image_worker.model import files
from image_worker.model.adapters import Adapter
from image_worker.model.build import build
from image_worker.model.hardware import detect_hardware
from image_worker.model.lora import Lora
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import MINI, MINI_FOLDER, make_picture, mini_model
from tests.pictures import psnr
from tests.worker_jobs import as_base64, job, picture

STYLE = MINI_FOLDER / "loras" / "miniature-outlined-style-bf16.safetensors"
NAME = "style.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loras")
    shutil.copy(STYLE, made / NAME)
    (made / "bad.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    tensors = load_file(STYLE)
    other = {name.replace("blocks.0", "blocks.70"): tensor for name, tensor in tensors.items()}
    save_file(other, made / "other.safetensors")
    modulating = {
        "transformer_blocks.0.img_mod.1.lora_A.weight": torch.randn(2, 128),
        "transformer_blocks.0.img_mod.1.lora_B.weight": torch.randn(768, 2),
    }
    save_file(modulating, made / "mod.safetensors")
    (made.parent / "secret.safetensors").write_bytes(STYLE.read_bytes())
    (made / "link.safetensors").symlink_to(made.parent / "secret.safetensors")
    return made


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    env = {"MODEL": "mini", "LORA_DIR": str(folder), "MODEL_DIR": str(folder / "models")}
    made = Worker.from_settings(Settings.from_env(env))
    yield made
    made.close()


def asked(source: str = NAME, **options: Any) -> list[dict[str, Any]]:
    return [{"source": source, **options}]


def styled(**options: Any) -> dict[str, Any]:
    return job(**{"seed": 1, "num_inference_steps": 8, **options})


def error(worker: Worker, loras: object) -> dict[str, Any]:
    found: dict[str, Any] = worker.run_blocking(job(loras=loras))["error"]
    return found


def test_a_job_with_a_lora_is_the_merged_one_and_the_next_is_as_before(worker: Worker) -> None:
    before = worker.run_blocking(styled())
    live = worker.run_blocking(styled(loras=asked()))
    after = worker.run_blocking(styled())
    assert after["images"] == before["images"]
    settings = Settings.from_env({"MODEL": "mini"})
    model = build(settings, MINI, detect_hardware(settings), loras=[STYLE])
    other = Worker(settings, model)
    merged = other.run_blocking(styled())
    other.close()
    assert psnr(picture(live), picture(merged)) > 35
    assert psnr(picture(live), picture(before)) < 25
    assert live["loras"] == [{"name": NAME, "scale": 1.0}]
    assert before["loras"] == []
    assert json.loads(picture(live).text["loras"]) == live["loras"]  # type: ignore[attr-defined]
    assert "loras" not in picture(before).text  # type: ignore[attr-defined]


def test_scales_matter_and_0_is_none(worker: Worker) -> None:
    plain = worker.run_blocking(job(seed=1, embed_metadata=False))["images"]
    found = [
        worker.run_blocking(job(seed=1, embed_metadata=False, loras=asked(scale=scale)))["images"]
        for scale in (0, 0.5, 1, 1)
    ]
    assert found[0] == plain != found[1] != found[2] == found[3]
    nothing = worker.run_blocking(job(seed=1, embed_metadata=False, loras=[]))["images"]
    assert nothing == plain


def test_a_lora_of_modulation_is_one_jobs_only(worker: Worker) -> None:
    options = {"seed": 1, "embed_metadata": False}
    plain = worker.run_blocking(job(**options))["images"]
    changed = worker.run_blocking(job(**options, loras=asked("mod.safetensors")))["images"]
    assert changed != plain == worker.run_blocking(job(**options))["images"]


def test_jobs_with_and_without_at_a_time(worker: Worker) -> None:
    given = [None, asked(), None, asked(), asked(scale=0.5), [*asked(), *asked("mod.safetensors")]]
    alone = [worker.run_blocking(job(seed=3, loras=loras)) for loras in given]
    with ThreadPoolExecutor(len(given)) as pool:
        jobs = [job(seed=3, loras=loras) for loras in given]
        together = list(pool.map(worker.run_blocking, jobs))
    for one, other in zip(alone, together, strict=True):
        assert psnr(picture(one), picture(other)) > 45
        assert one["loras"] == other["loras"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.safetensors", "has no missing.safetensors"),
        ("link.safetensors", "has no link.safetensors"),
        ("bad.safetensors", "not a readable safetensors file"),
        ("other.safetensors", "12 of 84 modules, the first: transformer_blocks.70."),
    ],
)
def test_what_is_no_lora_of_this_model_is_the_jobs_error(
    worker: Worker, source: str, said: str
) -> None:
    found = error(worker, [*asked(), *asked(source)])
    assert (found["type"], found["field"]) == ("invalid_lora", "loras[1].source")
    assert said in found["message"] and str(MINI_FOLDER.parent) not in found["message"]
    assert not found["retryable"]


@pytest.mark.parametrize(
    ("loras", "field"),
    [
        (asked("../style.safetensors"), "loras[0].source"),
        (asked("/etc/style.safetensors"), "loras[0].source"),
        (asked(".hidden.safetensors"), "loras[0].source"),
        (asked("a\\b.safetensors"), "loras[0].source"),
        (asked("style.bin"), "loras[0].source"),
        (asked("http://a.example/x.safetensors"), "loras[0].source"),
        (asked("https://a.example/x.ckpt"), "loras[0].source"),
        (asked("../x:y.safetensors"), "loras[0].source"),
        (asked("a/b:../y.safetensors"), "loras[0].source"),
        (asked("a/b:y.safetensors@../../x"), "loras[0].source"),
        (asked(scale=4.5), "loras[0].scale"),
        (asked(scale=float("nan")), "loras[0].scale"),
        (asked(scale="1"), "loras[0].scale"),
        (asked(weight=1), "loras[0].weight"),
        (asked() * 5, "loras"),
        (asked() * 2, None),
    ],
)
def test_malformed_requests(worker: Worker, loras: object, field: str | None) -> None:
    found = error(worker, loras)
    assert found["type"] == "invalid_request" and found.get("field") == field


def shelf(folder: Path | None, **env: str) -> Loras:
    if folder is not None:
        env["LORA_DIR"] = str(folder)
    return Loras(Settings.from_env(env), mini_model())


def option(source: str = NAME, scale: float = 1.0) -> LoraOption:
    return LoraOption(source=source, scale=scale)


def test_without_a_folder_none_may_be_named() -> None:
    with pytest.raises(InvalidLora, match="LORA_DIR is not set"):
        shelf(None).style([option()])


def test_a_folder_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="LORA_DIR"):
        shelf(tmp_path / "missing")


def test_a_file_is_read_once_and_forgotten_beyond_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    stock, go = Lora.read, threading.Event()

    def read(path: Path) -> Lora:
        reads.append(path.name)
        assert go.wait(60)
        return stock(path)

    monkeypatch.setattr(loras_module.Lora, "read", read)
    keeping, forgetting = shelf(folder), shelf(folder, LORA_CACHE_MB="0")
    with ThreadPoolExecutor(4) as pool:
        asked_for = [pool.submit(keeping.style, [option(scale=n + 1)]) for n in range(4)]
        go.set()
        styles = [future.result() for future in asked_for]
    assert len(reads) == 1 and len({style.key for style in styles if style}) == 4
    forgetting.style([option()])
    forgetting.style([option()])
    assert len(reads) == 3


def test_a_file_that_changed_is_another(folder: Path, tmp_path: Path) -> None:
    found = shelf(tmp_path)
    shutil.copy(folder / "mod.safetensors", tmp_path / NAME)
    first = found.style([option()])
    shutil.copy(STYLE, tmp_path / NAME)
    second = found.style([option()])
    assert first and second and first.key != second.key and first.nbytes < second.nbytes


def test_what_is_on_the_card_is_kept_and_shared(folder: Path) -> None:
    found, model = shelf(folder), mini_model()
    style = found.style([option()])
    again = found.style([option()])
    assert style and again
    adapter = style.adapter(model)
    assert again.adapter(model) is adapter
    assert adapter.nbytes == style.nbytes
    assert model.adapters.clear() and not model.adapters.clear()


def test_a_file_that_is_too_large_is_refused(folder: Path) -> None:
    found = shelf(folder)
    found._files.max_bytes = 1000
    with pytest.raises(InvalidLora, match="is over"):
        found.style([option()])


@pytest.mark.parametrize(
    ("cause", "env", "expected"),
    [
        (None, {}, InvalidLora),
        (OSError("no room"), {}, LoraUnavailable),
        (None, {"LOCAL_ONLY": "1"}, InvalidLora),
    ],
)
def test_what_the_hub_has_not(
    cause: Exception | None, env: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*_: Any, **__: Any) -> Path:
        raise ModelUnavailable("secret path /root") from cause

    monkeypatch.setattr(files, "find_on_hub", find)
    with pytest.raises(expected) as caught:
        shelf(None, **env).style([option("owner/name:x.safetensors@main")])
    assert "secret" not in caught.value.message


def test_a_file_of_the_hub_is_found_where_models_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def find(file: Any, settings: Settings, cache: Path, *, max_bytes: int, token: bool) -> Path:
        asked_for.append((file.repo, file.path, file.revision, max_bytes))
        return STYLE

    monkeypatch.setattr(files, "find_on_hub", find)
    shelf(None).style([option("a/b:c/d.safetensors"), option("a/b:d.safetensors@refs/pr/1")])
    size = 2048 * 10**6
    assert asked_for == [
        ("a/b", "c/d.safetensors", "main", size),
        ("a/b", "d.safetensors", "refs/pr/1", size),
    ]


def test_what_is_fetched_from_a_url_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(url: str, place: Path, max_bytes: int) -> None:
        fetched.append(url)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(STYLE, place)

    monkeypatch.setattr(loras_module.sources, "fetch", fetch)
    found, urls = shelf(None, MODEL_DIR=str(tmp_path)), ["https://a.example/x.safetensors?key=1"]
    urls.append(urls[0] + "2")
    keys = [style.key for url in [*urls, *urls] if (style := found.style([option(url)]))]
    assert fetched == urls and keys[0] == keys[2] != keys[1] == keys[3]
    closed = shelf(None, MODEL_DIR=str(tmp_path), LOCAL_ONLY="1")
    assert closed.style([option(urls[0])])
    with pytest.raises(InvalidLora, match="LOCAL_ONLY"):
        closed.style([option(urls[0] + "3")])


def test_downloads_do_not_fill_the_disk(tmp_path: Path) -> None:
    for number, name in enumerate([*(f"{number:032x}" for number in range(4)), "mine"]):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"x" * 10)
        os.utime(path, (number, number))
    lora_files._trim(tmp_path, 25, tmp_path / f"{0:032x}.safetensors")
    left = sorted(path.stem.lstrip("0") for path in tmp_path.iterdir())
    assert left == ["", "3", "mine"], "a file of the operator's, who keeps LoRAs there, too"


def test_a_large_file_of_the_hub_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listed:
        def __init__(self, *_: object) -> None: ...

        def size(self, path: str) -> int:
            return 3 * 10**9

    monkeypatch.setattr(files, "Snapshot", Listed)
    with pytest.raises(InvalidLora, match="over 2048 MB"):
        shelf(None, MODEL_DIR=str(tmp_path)).style([option("a/b:c.safetensors")])


def test_the_jobs_of_a_step_have_forwards_by_their_loras(folder: Path) -> None:
    model, found = mini_model(), shelf(folder).style([option()])
    assert found
    encoded = conditions.encode(model, "blur it", None, [make_picture()])

    def pictures(*adapters: Adapter | None) -> list[Picture]:
        options: dict[str, Any] = {"seed": 1, "steps": 2, "cfg_scale": 1.0}
        return [start(model, encoded, (64, 64), **options, adapter=one) for one in adapters]

    adapter = found.adapter(model)
    together = pictures(None, adapter, adapter)
    assert step(model, together, Limits(4)) == [1, 2]
    alone = [*pictures(None), *pictures(adapter)]
    for one in alone:
        step(model, [one], Limits(1))
    for one, other in zip(together, [*alone, alone[1]], strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-4)
    assert not torch.allclose(alone[0].latents, alone[1].latents, atol=1e-2)


def test_what_loras_take_on_the_card_counts_where_a_job_is_forecast() -> None:
    model = mini_model()
    reference = conditions.as_reference(model, make_picture())
    prepared = conditions.prepare(model, "blur it", None, [reference])
    (length,) = conditions.row_lengths(model, prepared, (128, 128), 1)
    plan = dataclasses.replace(model.plan, most_tokens=length.total + 10, token_bytes=100)
    model = dataclasses.replace(model, plan=plan)
    check_fits(model, prepared, (128, 128), 1000)
    with pytest.raises(OutOfMemory):
        check_fits(model, prepared, (128, 128), 1001)


def test_a_style_from_a_picture_of_another_size(worker: Worker) -> None:
    wide = as_base64(make_picture(200, 100))
    assert "images" in worker.run_blocking(job(image_base64=wide, loras=asked(), num_images=2))
