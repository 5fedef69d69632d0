"""The worker on the miniature: whole jobs, good and bad, through the one door that callers have."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from image_worker.edit import denoise as denoise_module
from image_worker.errors import BrokenPicture, DoesNotFit
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import make_picture, mini_model
from tests.job.test_images import bomb
from tests.pictures import encoded, psnr
from tests.worker_jobs import as_base64, job, picture


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker.from_settings(Settings.from_env({"MODEL": "mini"}))


def test_a_reply_has_the_picture_and_how_it_was_made(worker: Worker) -> None:
    reply = worker.run_blocking(job(seed=11))
    assert picture(reply).size == (128, 128)
    assert reply["output_image_base64"] == reply["images"][0]
    expected = {
        "prompt": "make the red circle blue",
        "seed": 11,
        "num_inference_steps": 2,
        "lightning_enabled": True,
        "true_cfg_scale": 1.0,
        "width": 128,
        "height": 128,
        "model": "mini",
        "precision": "bf16",
    }
    assert {name: reply[name] for name in expected} == expected
    assert set(reply["timings"]) == {
        "fetch",
        "wait",
        "encode",
        "denoise",
        "decode",
        "file",
        "total",
    }
    assert all(seconds >= 0 for seconds in reply["timings"].values())
    json.dumps(reply, allow_nan=False)


def test_the_first_reply_tells_of_the_cold_start() -> None:
    fresh = Worker.from_settings(Settings.from_env({"MODEL": "mini"}))
    first, second = fresh.run_blocking(job()), fresh.run_blocking(job())
    names = [step["name"] for step in first["cold_start"]["steps"]]
    assert names[0] == "find files" and names[-1] == "first edit"
    assert "cold_start" not in second


def test_the_seed_is_reported_and_repeats_the_picture(worker: Worker) -> None:
    first = worker.run_blocking(job())
    again = worker.run_blocking(job(seed=first["seed"]))
    other = worker.run_blocking(job())
    assert first["images"] == again["images"]
    assert first["images"] != other["images"]


def test_several_pictures_are_those_of_their_seeds(worker: Worker) -> None:
    reply = worker.run_blocking(job(seed=3, num_images=3))
    assert reply["seeds"] == [3, 4, 5]
    assert len(set(reply["images"])) == 3
    assert (picture(reply, 2).size, picture(reply).format) == ((128, 128), "PNG")


def test_defaults_with_lightning(worker: Worker) -> None:
    reply = worker.run_blocking(job(num_inference_steps=None))
    assert (reply["num_inference_steps"], reply["true_cfg_scale"]) == (8, 1.0)
    assert reply["warnings"] == []


def test_defaults_without_lightning() -> None:
    plain = Worker.from_settings(Settings.from_env({"MODEL": "mini", "USE_LIGHTNING_LORA": "0"}))
    reply = plain.run_blocking(job(num_inference_steps=None))
    assert (reply["num_inference_steps"], reply["true_cfg_scale"]) == (20, 1.0)
    assert reply["lightning_enabled"] is False
    one = plain.run_blocking(job(num_inference_steps=1))
    assert one["error"]["field"] == "num_inference_steps"


def test_what_is_likely_not_meant_is_said(worker: Worker) -> None:
    reply = worker.run_blocking(job(true_cfg_scale=4.0, num_inference_steps=3))
    assert len(reply["warnings"]) == 2
    reply = worker.run_blocking(job(num_inference_steps=8, negative_prompt="ugly"))
    assert len(reply["warnings"]) == 1


def test_guidance_and_negative_prompt_reach_the_picture(worker: Worker) -> None:
    def edit(**options: Any) -> Any:
        reply = worker.run_blocking(job(seed=1, embed_metadata=False, **options))
        return reply["images"]

    plain, guided = edit(), edit(true_cfg_scale=4.0)
    assert plain != guided
    assert edit(true_cfg_scale=4.0, negative_prompt=" ") == guided, "the default is a space"
    assert edit(true_cfg_scale=4.0, negative_prompt="ugly") != guided
    assert edit(negative_prompt="ugly") == plain


def test_the_default_guidance_can_be_set() -> None:
    settings = Settings.from_env({"MODEL": "mini", "DEFAULT_CFG_SCALE": "2.5"})
    guided = Worker.from_settings(settings)
    assert guided.run_blocking(job())["true_cfg_scale"] == 2.5
    assert guided.run_blocking(job(true_cfg_scale=1.0))["true_cfg_scale"] == 1.0


def test_the_last_picture_gives_the_shape(worker: Worker) -> None:
    pair = [as_base64(make_picture(100, 200)), as_base64(make_picture(200, 100))]
    reply = worker.run_blocking(job(image_base64=None, images=pair))
    assert (reply["width"], reply["height"]) == (192, 96)


def test_one_job_at_a_time_has_the_card(worker: Worker, monkeypatch: Any) -> None:
    stock, busy, most = denoise_module.velocities, [], []

    def counting(module: Any, rows: Any, *rest: Any) -> Any:
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.01)
        found = stock(module, rows, *rest)
        busy.pop()
        return found

    monkeypatch.setattr(denoise_module, "velocities", counting)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda seed: worker.run_blocking(job(seed=seed)), [1, 1, 1, 2]))
    assert max(most) == 1
    first, *same, other = [picture(reply) for reply in replies]
    assert all(psnr(one, first) > 45 for one in same) and psnr(other, first) < 45


def test_a_model_that_cannot_edit_prevents_the_start(monkeypatch: Any) -> None:
    def fail(_: Any) -> None:
        raise BrokenPicture("overflow")

    monkeypatch.setattr("image_worker.worker.warm_up", fail)
    with pytest.raises(BrokenPicture):
        Worker.from_settings(Settings.from_env({"MODEL": "mini"}))


@pytest.mark.parametrize(("form", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_output_formats(form: str, pillow: str, worker: Worker) -> None:
    assert picture(worker.run_blocking(job(output_format=form))).format == pillow


def test_quality_matters(worker: Worker) -> None:
    sizes = [
        len(worker.run_blocking(job(seed=1, output_format="jpeg", quality=quality))["images"][0])
        for quality in (10, 95)
    ]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((200, 100), {}, (192, 96)),
        ((128, 128), {"width": 64, "height": 256}, (64, 256)),
        ((200, 100), {"width": 256}, (256, 128)),
    ],
)
def test_sizes(
    size: tuple[int, int], options: dict[str, int], expected: tuple[int, int], worker: Worker
) -> None:
    image = as_base64(make_picture(*size))
    assert picture(worker.run_blocking(job(image_base64=image, **options))).size == expected


def test_a_shape_that_needs_a_size(worker: Worker) -> None:
    narrow = as_base64(make_picture(640, 80))
    error = worker.run_blocking(job(image_base64=narrow))["error"]
    assert error["field"] == "height"
    assert "give width and height" in error["message"]
    assert "images" in worker.run_blocking(job(image_base64=narrow, width=256, height=64))


def test_four_references(worker: Worker) -> None:
    four = [as_base64(make_picture(96 + 16 * n, 128, n)) for n in range(4)]
    assert "images" in worker.run_blocking(job(image_base64=None, images=four))


def test_progress_is_told(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []
    worker.run_blocking(job(num_inference_steps=3), lambda step, of: seen.append((step, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def malformed() -> list[Any]:
    """A hundred jobs that are wrong, each in its own way."""
    good = as_base64(make_picture())
    png, jpeg = encoded(make_picture()), encoded(make_picture(), "JPEG")
    wrong_types = [None, 0, 1.5, True, [], {}, ["a"], {"a": 1}]
    inputs: list[Any] = [None, 0, "x", [], True, {}, {"prompt": "x"}, {"image": good}]
    inputs += [{"prompt": value, "image": good} for value in wrong_types]
    inputs += [{"prompt": "x", "image": value} for value in wrong_types[1:]]
    inputs += [{"prompt": "x", "images": value} for value in (*wrong_types, "x", [None], [[]])]
    inputs += [
        {"prompt": "x", "image": good, name: value}
        for name in ("seed", "width", "num_inference_steps", "true_cfg_scale", "num_images")
        for value in ("1", [], {}, True, float("nan"), -5, 10**30)
    ]
    inputs += [{"prompt": "x", "image": good, name: 1} for name in ("Seed", "lora", "", "a" * 5000)]
    inputs += [
        {"prompt": "x", "image_url": url}
        for url in (
            "file:///etc/passwd",
            "/etc/passwd",
            "../secret.png",
            "http://",
            "http://127.0.0.1/x.png",
            "http://localhost:8000/x.png",
            "http://169.254.169.254/latest/meta-data",
            "http://[::1]/x.png",
            "https://10.0.0.1/x.png",
            "ftp://a.example/x.png",
            "http://no-such-host.invalid/x.png",
        )
    ]
    broken = [png[:cut] for cut in (1, 8, 30, 100, len(png) // 2, len(png) * 3 // 4)]
    broken += [jpeg[:cut] for cut in (2, 20, 200, len(jpeg) // 2)]
    broken += [bomb(50_000, 50_000), bomb(1, 10**6), bomb(0, 0), b"\0" * 1000, b"<svg/>"]
    inputs += [{"prompt": "x", "image": base64.b64encode(data).decode()} for data in broken]
    inputs += [{"prompt": "x", "image": text} for text in ("", "!", "====", "\0", "é" * 10)]
    inputs += [
        {"prompt": "<|im_end|>", "image": good},
        {"prompt": "red " * 1100, "image": good},
        {"prompt": "x" * 30_000, "image": good},
        {"prompt": "x", "negative_prompt": "<|image_pad|>", "image": good},
        {"prompt": "x", "image": good, "width": 72},
        {"prompt": "x", "image": good, "width": 4096, "height": 4096},
        {"prompt": "x", "image": good, "output_format": "exe"},
    ]
    inputs += [
        {"prompt": "x", "image": good, "loras": value}
        for value in (
            1,
            {},
            ["x"],
            [{}],
            [{"source": "../x.safetensors"}],
            [{"source": "x.safetensors"}],
            [{"source": "x.safetensors", "scale": 5}],
            [{"source": "http://a.example/x.safetensors"}],
            [{"source": "https://127.0.0.1/x.safetensors"}],
        )
    ]
    return inputs


def test_a_hundred_malformed_jobs_each_get_a_typed_error(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = malformed()
    assert len(jobs) >= 100
    before = worker.run_blocking(job(seed=1))["images"]
    with caplog.at_level(logging.CRITICAL):
        for number, job_input in enumerate(jobs):
            reply = worker.run_blocking({"id": str(number), "input": job_input})
            assert set(reply) == {"error"}, f"accepted: {str(job_input)[:200]}"
            error = reply["error"]
            assert error["type"] in (
                "invalid_request",
                "invalid_image",
                "image_unavailable",
                "invalid_lora",
            )
            assert error["message"] and len(error["message"]) <= 2000
            for secret in ("Traceback", "/usr", "/root", "site-packages", 'File "'):
                assert secret not in error["message"]
            json.dumps(reply, allow_nan=False)
    assert worker.run_blocking(job(seed=1))["images"] == before, (
        "the next good job works, and as before"
    )


def test_an_unforeseen_error_tells_the_log_and_not_the_caller(
    worker: Worker, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret path /root/x")

    monkeypatch.setattr("image_worker.engine.step", fail)
    reply = worker.run_blocking(job() | {"id": "job-7"})
    assert reply["error"]["type"] == "internal_error"
    assert reply["error"]["retryable"] is True
    assert "secret" not in json.dumps(reply)
    assert "job-7" in caplog.text and "secret path" in caplog.text and "Traceback" in caplog.text
    monkeypatch.undo()
    assert "images" in worker.run_blocking(job())


def test_memory_that_runs_out_is_that_jobs_error(worker: Worker, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(denoise_module, "velocities", fail)
    error = worker.run_blocking(job())["error"]
    assert error["type"] == "out_of_memory"
    assert "smaller size" in error["message"]
    monkeypatch.undo()
    assert "images" in worker.run_blocking(job())


@pytest.mark.parametrize("text", ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_other_libraries_lack_memory_in_other_words(
    text: str, worker: Worker, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(denoise_module, "velocities", fail)
    assert worker.run_blocking(job())["error"]["type"] == "out_of_memory"


def test_numbers_that_overflow_are_no_picture(worker: Worker, monkeypatch: Any) -> None:
    stock = denoise_module.velocities

    def overflow(module: Any, rows: Any, *rest: Any) -> Any:
        return [velocity * float("inf") for velocity in stock(module, rows, *rest)]

    monkeypatch.setattr(denoise_module, "velocities", overflow)
    error = worker.run_blocking(job())["error"]
    assert error["type"] == "broken_picture" and "the model's numbers" in error["message"]


def test_a_vae_that_overflows_makes_no_picture(worker: Worker, monkeypatch: Any) -> None:
    def overflow(*_: Any) -> Any:
        return torch.full((1, 3, 128, 128), float("nan"))

    monkeypatch.setattr(worker.model.vae, "decode", overflow)
    error = worker.run_blocking(job())["error"]
    assert error["type"] == "broken_picture" and "VAE" in error["message"]


def test_settings_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    Worker.from_settings(Settings.from_env({"MODEL": "mini", "CPU_OFFLOAD": "model"}))
    assert "no CUDA card" in caplog.text


def test_a_card_that_is_too_small_stops_the_start(monkeypatch: Any) -> None:
    from image_worker.model.hardware import Hardware

    tiny = Hardware("a small card", free=2**20)
    monkeypatch.setattr("image_worker.worker.detect_hardware", lambda _: tiny)
    with pytest.raises(DoesNotFit, match="a small card"):
        Worker.from_settings(Settings.from_env({"MODEL": "mini"}))


def test_a_job_that_cannot_fit_is_refused_before_it_is_queued(monkeypatch: Any) -> None:
    worker = Worker(Settings.from_env({}), mini_model(torch.float32))
    tokens = 64 + 64 + 40
    plan = dataclasses.replace(worker.model.plan, most_tokens=tokens)
    worker.model = dataclasses.replace(worker.model, plan=plan)
    monkeypatch.setattr(worker.engine, "submit", lambda _: pytest.fail("it was queued"))
    reply = worker.run_blocking(job(width=256, height=256))
    assert reply["error"]["type"] == "out_of_memory"
    assert "instead of 256x256 would fit" in reply["error"]["message"]
    worker.close()
