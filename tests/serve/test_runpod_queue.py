"""The adapter to RunPod's SDK: what it posts, how many jobs it takes, and its local server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from runpod.serverless.modules import rp_ping, rp_scale
from runpod.serverless.modules.rp_job import run_job

from image_worker.serve import runpod_queue
from image_worker.serve.runpod_queue import for_sdk, serve
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.serve.stub_worker import StubWorker
from tests.worker_jobs import job


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker.from_settings(Settings.from_env({"MODEL": "mini"}))
    yield worker
    worker.close()


def through_the_sdk(worker: Worker, given: dict[str, Any]) -> dict[str, Any]:
    async def handler(found: dict[str, Any]) -> dict[str, Any]:
        return for_sdk(await worker.run(found))

    posted: dict[str, Any] = asyncio.run(run_job(handler, given))
    return posted


def test_a_good_job_is_posted_as_output(worker: Worker) -> None:
    posted = through_the_sdk(worker, job())
    assert set(posted) == {"output"}
    assert posted["output"]["images"]


def test_an_error_is_posted_as_text_that_holds_json(worker: Worker) -> None:
    posted = through_the_sdk(worker, job(seed="x"))
    assert set(posted) == {"error"}
    assert json.loads(posted["error"])["field"] == "seed"


@pytest.fixture
def config(monkeypatch: Any) -> dict[str, Any]:
    """What the SDK is started with."""
    configs: list[dict[str, Any]] = []
    monkeypatch.setattr("runpod.serverless.start", configs.append)
    monkeypatch.setattr(rp_scale, "JobScaler", rp_scale.JobScaler)
    monkeypatch.setattr(rp_ping.Heartbeat, "process_loop", rp_ping.Heartbeat.process_loop)
    monkeypatch.setattr("runpod.serverless.modules.rp_fitness._fitness_checks", [])
    settings = Settings.from_env({"BATCH_SIZE": "3"})
    assert serve(StubWorker(), settings) == 0  # type: ignore[arg-type]
    return configs[0]


def test_there_is_a_slot_for_the_batch_and_for_the_next(config: dict[str, Any]) -> None:
    assert [config["concurrency_modifier"](now) for now in (1, 6)] == [6, 6]


def test_jobs_that_come_in_the_same_instant_as_the_signal_are_run(
    config: dict[str, Any], monkeypatch: Any
) -> None:
    async def serve_until_stopped() -> list[str]:
        jobs = runpod_queue._Jobs(config)
        answered = []

        async def take(session: Any, free: int) -> list[dict[str, Any]]:
            await asyncio.sleep(0.3)
            jobs.kill_worker()
            await asyncio.sleep(0.3)  # the SDK's loop that runs jobs has ended meanwhile
            return [{"id": "late", "input": {}}]

        async def answer(session: Any, config: Any, found: dict[str, Any]) -> None:
            answered.append(found["id"])

        jobs.jobs_fetcher, jobs.jobs_handler = take, answer
        await jobs.run()
        return answered

    assert asyncio.run(serve_until_stopped()) == ["late"]


@pytest.mark.parametrize("cancelled", [False, True])
def test_an_update_under_way_comes_before_the_result_and_ends_with_a_cancelled_job(
    cancelled: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(runpod_queue, "_TELL_SECONDS", 0.0)
    seen: list[Any] = []

    async def send(progress: dict[str, Any]) -> None:
        await asyncio.sleep(0.2)
        seen.append(progress["step"])

    async def run() -> None:
        async with runpod_queue._Telling(send) as telling:
            telling(1, 3)
            await asyncio.sleep(0.01)
            telling(2, 3)  # left out: the first is still under way
            if cancelled:
                raise asyncio.CancelledError
        telling(3, 3)
        seen.append("result")

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run())
    assert seen == ([] if cancelled else [1, "result"])


def test_the_sdk_serves_http_when_it_is_asked_to(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "tests.serve.stub_worker", "--rp_serve_api", "--rp_api_port", str(port)]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    try:
        body = {"input": {"seconds": 0}}
        reply = _post_when_ready(f"http://localhost:{port}/runsync", body)
        assert reply["status"] == "COMPLETED"
        assert reply["output"] == {"seed": 1}
    finally:
        process.terminate()
        process.wait(20)


def test_health_says_nothing_of_a_queue_worker() -> None:
    """RunPod watches its workers itself; the container's check is for standalone mode."""
    command = [sys.executable, "-m", "image_worker.serve.health"]
    environment = {name: text for name, text in os.environ.items() if name != "STANDALONE_MODE"}
    assert subprocess.run(command, env=environment, check=False).returncode == 0


def _post_when_ready(url: str, body: dict[str, Any]) -> Any:
    for _ in range(120):
        try:
            return requests.post(url, json=body, timeout=60).json()
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError("the server did not come up")
