"""The standalone server over real HTTP, with RunPod's kind of client and OpenAI's own."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from PIL import Image

from image_worker import engine as engine_module
from image_worker.catalog import TEXT_TO_IMAGE
from image_worker.serve import jobs as jobs_module
from image_worker.serve.http_server import MAX_BODY
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import MINI, make_picture, mini_model
from tests.serve.served import serving
from tests.waiting import SECONDS, eventually
from tests.worker_jobs import as_base64, job

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker.from_settings(Settings.from_env({"MODEL": "mini"}))
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(worker: Worker) -> Iterator[str]:
    with serving(worker) as found:
        yield found


def body(**options: Any) -> dict[str, Any]:
    return {"input": job(**options)["input"]}


def post(url: str, content: Any = None, **options: Any) -> requests.Response:
    return requests.post(url, json=content, timeout=SECONDS, **options)


def get(url: str, **options: Any) -> requests.Response:
    return requests.get(url, timeout=SECONDS, **options)


def ended(url: str, job_id: str) -> dict[str, Any]:
    """A job's view, once it is done."""

    def view() -> dict[str, Any]:
        found: dict[str, Any] = get(f"{url}/status/{job_id}").json()
        return found

    eventually(lambda: view()["status"] not in ("IN_QUEUE", "IN_PROGRESS"))
    return view()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, the card takes no step."""
    released = threading.Event()
    stock = engine_module.step

    def step(*given: Any) -> Any:
        assert released.wait(SECONDS)
        return stock(*given)

    monkeypatch.setattr(engine_module, "step", step)
    yield released
    released.set()


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_runsync_answers_with_the_picture(url: str) -> None:
    answer = post(f"{url}/runsync", body(seed=3))
    assert answer.status_code == 200
    seen = answer.json()
    assert seen["status"] == "COMPLETED" and seen["delayTime"] >= 0 <= seen["executionTime"]
    assert seen["output"]["seed"] == 3
    assert picture(seen["output"]["images"][0]).size == (128, 128)


def test_a_job_is_queued_watched_and_fetched(url: str, held: threading.Event) -> None:
    accepted = post(f"{url}/run", body()).json()
    assert accepted["status"] == "IN_QUEUE"
    assert get(f"{url}/status/{accepted['id']}").json()["status"] == "IN_QUEUE"
    held.set()
    seen = ended(url, accepted["id"])
    assert seen["status"] == "COMPLETED" and "progress" not in seen
    assert ended(url, accepted["id"]) == seen, "an answer can be fetched again"


def events(answer: requests.Response) -> list[tuple[str, Any]]:
    found, name = [], ""
    for line in answer.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_a_stream_tells_of_every_step_and_ends_with_the_job(
    url: str, held: threading.Event
) -> None:
    job_id = post(f"{url}/run", body(num_inference_steps=4)).json()["id"]
    with get(f"{url}/stream/{job_id}", stream=True) as answer:
        held.set()
        found = events(answer)
    steps = [data["step"] for name, data in found if name == "progress"]
    assert steps == sorted(set(steps)) and steps[-1] == 4
    assert {name for name, _ in found} == {"progress", "done"}
    assert found[-1][0] == "done" and found[-1][1]["status"] == "COMPLETED"
    with get(f"{url}/stream/{job_id}", stream=True) as answer:
        assert events(answer)[-1] == found[-1], "whoever comes late gets the end, too"


def test_previews_are_shown_if_asked_for(url: str, held: threading.Event) -> None:
    job_id = post(f"{url}/run?previews=true", body(num_inference_steps=6)).json()["id"]
    with get(f"{url}/stream/{job_id}", stream=True) as answer:
        held.set()
        shown = [data for name, data in events(answer) if name == "preview"]
    assert shown and all(picture(data).format == "JPEG" for data in shown)


def test_a_job_is_cancelled(url: str, held: threading.Event) -> None:
    job_id = post(f"{url}/run", body()).json()["id"]
    assert post(f"{url}/cancel/{job_id}").json()["status"] == "CANCELLED"
    assert get(f"{url}/status/{job_id}").json()["status"] == "CANCELLED"
    held.set()
    assert post(f"{url}/runsync", body()).json()["status"] == "COMPLETED"
    done = post(f"{url}/run", body()).json()["id"]
    ended(url, done)
    assert post(f"{url}/cancel/{done}").json()["status"] == "COMPLETED", "too late: nothing happens"


def test_who_hangs_up_on_runsync_cancels(url: str, held: threading.Event, worker: Worker) -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{url}/runsync", json=body(), timeout=0.5)
    held.set()
    eventually(lambda: not get(f"{url}/health").json()["running"])
    assert 'status="cancelled"' in get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "input"),
        ({"input": {}}, "prompt"),
        ({"input": {"prompt": "x", "image": "x", "nonsense": 1}}, "nonsense"),
        ({"input": {"prompt": "x"}, "webhook": "https://a.example"}, "webhook"),
        ([], None),
        ("x", None),
    ],
)
def test_a_wrong_job_is_refused_at_the_door(url: str, content: Any, field: str | None) -> None:
    for route in ("/run", "/runsync"):
        answer = post(url + route, content)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request" and error.get("field") == field


def test_what_goes_wrong_later_fails_the_job(url: str) -> None:
    seen = post(f"{url}/runsync", body(image_base64="AAAA")).json()
    assert seen["status"] == "FAILED" and seen["error"]["type"] == "invalid_image"
    assert "output" not in seen


def test_other_bodies_and_routes(url: str) -> None:
    answer = requests.post(f"{url}/run", data=b"{", timeout=SECONDS)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "the body is not JSON"
    assert get(f"{url}/status/nope").json()["error"]["type"] == "unknown_job"
    assert get(f"{url}/stream/nope").status_code == 404
    assert post(f"{url}/cancel/nope").status_code == 404
    answer = get(f"{url}/nowhere")
    assert answer.status_code == 404 and answer.json()["error"]["message"] == "Not Found"
    answer = get(f"{url}/run")
    assert answer.status_code == 405 and answer.headers["Allow"] == "POST"
    form = {"Content-Type": "multipart/form-data"}
    answer = requests.post(f"{url}/v1/images/edits", data=b"x", headers=form, timeout=SECONDS)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"


def test_a_body_over_the_limit_is_not_read(url: str) -> None:
    headers = {"Content-Length": str(MAX_BODY + 1), "Content-Type": "application/json"}
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["POST /run HTTP/1.1", "Host: x", *lines, "", ""])
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)

    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 2**20 + 2):
            yield b" " * 2**20

    try:
        answer = requests.post(f"{url}/run", data=endless(), timeout=SECONDS)
        assert answer.status_code == 413 and answer.json()["error"]["type"] == "too_large"
    except requests.exceptions.ConnectionError:
        pass  # it hung up while we were still sending
    assert get(f"{url}/ready").json() == {"ready": True}


def test_a_full_queue_says_when_to_come_back(worker: Worker, held: threading.Event) -> None:
    with serving(worker, QUEUE_SIZE="2") as url:
        ids = [post(f"{url}/run", body()).json()["id"] for _ in range(2)]
        answer = post(f"{url}/run", body())
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["retryable"] is True
        assert get(f"{url}/ready").status_code == 503
        assert get(f"{url}/health").status_code == 200
        held.set()
        assert {ended(url, job_id)["status"] for job_id in ids} == {"COMPLETED"}
        assert post(f"{url}/runsync", body()).status_code == 200


def test_answers_are_kept_for_a_while(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(worker) as url:
        first = post(f"{url}/run", body()).json()["id"]
        size = len(ended(url, first)["output"]["images"][0])
        monkeypatch.setattr(jobs_module, "KEEP_BYTES", size * 3 // 2)
        second = post(f"{url}/run", body()).json()["id"]
        ended(url, second)
        assert get(f"{url}/status/{first}").status_code == 404
        assert get(f"{url}/status/{second}").status_code == 200
        monkeypatch.setattr(jobs_module, "KEEP_SECONDS", 0)
        time.sleep(0.01)
        assert get(f"{url}/status/{second}").status_code == 404


def test_an_api_key_is_asked_for(worker: Worker) -> None:
    with serving(worker, API_KEY="s3cret") as url:
        right = {"Authorization": "Bearer s3cret"}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            answer = post(f"{url}/runsync", body(), headers=header)
            assert answer.status_code == 401 and "WWW-Authenticate" in answer.headers
            assert get(f"{url}/status/x", headers=header).status_code == 401
            assert get(f"{url}/metrics", headers=header).status_code == 401
            assert get(f"{url}/v1/models", headers=header).status_code == 401
        assert post(f"{url}/runsync", body(), headers=right).status_code == 200
        for route in ("/health", "/ready", "/"):
            assert get(url + route).status_code == 200


def test_metrics_count(url: str) -> None:
    post(f"{url}/runsync", body())
    post(f"{url}/runsync", body(image_base64="AAAA"))
    found = get(f"{url}/metrics").text
    for line in (
        'image_worker_jobs_total{status="completed"}',
        'image_worker_job_errors_total{type="invalid_image"}',
        'image_worker_stage_seconds_count{stage="denoise"}',
        "image_worker_batch_size_sum",
        "image_worker_jobs_unfinished 0.0",
        "image_worker_engine_busy_seconds",
        "image_worker_encodings_reused",
        "image_worker_vram_used_bytes",
    ):
        assert line in found, line


def counted(url: str) -> int:
    """Jobs that are ready or on the card."""
    found = get(f"{url}/health").json()
    return int(found["waiting"] + found["running"])


def test_jobs_that_come_together_share_the_card(url: str, held: threading.Event) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(post, f"{url}/runsync", body(seed=seed, num_inference_steps=4))
            for seed in range(4)
        ]
        eventually(lambda: counted(url) == 4)
        held.set()
        outputs = [answer.result().json()["output"] for answer in answers]
    assert max(output["batch_size"] for output in outputs) > 1


def client(url: str, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **options)


def file(seed: int = 0) -> tuple[str, bytes]:
    return f"{seed}.png", base64.b64decode(as_base64(make_picture(seed=seed)))


def test_openais_client_edits(url: str) -> None:
    prompt = "make the red circle blue"
    extra = {"seed": 5, "num_inference_steps": 2}
    answer = client(url).images.edit(
        model="mini", image=file(), prompt=prompt, n=2, size="128x112", extra_body=extra
    )
    assert answer.data is not None and len(answer.data) == 2
    found = [picture(item.b64_json or "") for item in answer.data]
    assert [image.size for image in found] == [(128, 112)] * 2
    several = client(url).images.edit(
        image=[file(1), file(2)], prompt=prompt, output_format="webp", output_compression=60
    )
    assert several.data is not None and picture(several.data[0].b64_json or "").format == "WEBP"
    assert [model.id for model in client(url).models.list()] == ["mini"]


def test_a_form_field_is_one_text_or_files(url: str) -> None:
    texts = {"prompt": "make it blue", "image": "https://example.com/a.png"}
    answer = requests.post(
        f"{url}/v1/images/edits", texts, files={"image": file()}, timeout=SECONDS
    )
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_openais_client_is_told_what_is_wrong(url: str) -> None:
    for options, code in (
        ({"prompt": "x", "model": "dall-e-2"}, "model"),
        ({"prompt": "x", "mask": file()}, "mask"),
        ({"prompt": "x", "background": "transparent"}, "background"),
        ({"prompt": "x", "quality": "high"}, "quality"),
        ({"prompt": "x", "size": "huge"}, "size"),
        ({"prompt": "x", "response_format": "url"}, "response_format"),
        ({"prompt": "", "size": "auto"}, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client(url).images.edit(image=file(), **options)  # type: ignore[call-overload]
        assert caught.value.param == code and caught.value.code == "invalid_request"
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        client(url).images.edit(image=("x.png", b"no picture"), prompt="x")
    with pytest.raises(openai.BadRequestError, match="edits pictures"):
        client(url).images.generate(prompt="x")


def test_openais_client_generates_where_the_model_does() -> None:
    entry = dataclasses.replace(MINI, name="mini-image", max_images=0, template=TEXT_TO_IMAGE)
    model = dataclasses.replace(mini_model(), entry=entry)
    worker = Worker(Settings.from_env({}), model)
    with serving(worker, API_KEY="key") as url:
        answer = client(url, "key").images.generate(
            prompt="a red circle", size="128x128", extra_body={"num_inference_steps": 2}
        )
        assert answer.data is not None and picture(answer.data[0].b64_json or "").size == (128, 128)
        with pytest.raises(openai.BadRequestError, match="takes no picture"):
            client(url, "key").images.edit(image=file(), prompt="x")
        with pytest.raises(openai.AuthenticationError):
            client(url, "wrong").images.generate(prompt="x")
    worker.close()


def start(port: int) -> subprocess.Popen[bytes]:
    environment = {"STANDALONE_MODE": "1", "API_PORT": str(port), "MODEL": "mini"}
    environment["OMP_NUM_THREADS"] = "1"  # other tests run at the same time
    return subprocess.Popen([sys.executable, "handler.py"], cwd=ROOT, env=environment)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def test_told_to_stop_it_finishes_its_jobs_and_takes_no_more() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(port)
    try:
        eventually(lambda: answers(port) or process.poll() is not None)
        assert get(f"{url}/ready").status_code == 200
        ids = [post(f"{url}/run", body(num_inference_steps=20)).json()["id"] for _ in range(6)]
        process.send_signal(signal.SIGTERM)
        while (answer := post(f"{url}/run", body())).status_code == 200:
            ids.append(answer.json()["id"])
        assert answer.status_code == 503 and answer.json()["error"]["retryable"] is True
        assert get(f"{url}/ready").status_code == 503
        assert {ended(url, job_id)["status"] for job_id in ids} == {"COMPLETED"}
        process.send_signal(signal.SIGTERM)  # everything was fetched: no need to linger
        assert process.wait(SECONDS) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
