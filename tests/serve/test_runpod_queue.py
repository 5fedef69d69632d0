"""The handler under the real RunPod SDK: its job runner, and its HTTP server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from runpod.serverless.modules.rp_job import run_job

from image_worker.serve.runpod_queue import for_sdk, serve
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.worker_jobs import job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker.from_settings(Settings.from_env({"MODEL": "mini"}))


def through_the_sdk(worker: Worker, given: dict[str, Any]) -> dict[str, Any]:
    async def handler(found: dict[str, Any]) -> dict[str, Any]:
        return for_sdk(await asyncio.to_thread(worker.run, found))

    found: dict[str, Any] = asyncio.run(run_job(handler, given))
    return found


def test_a_good_job_is_posted_as_output(worker: Worker) -> None:
    posted = through_the_sdk(worker, job())
    assert set(posted) == {"output"}
    assert posted["output"]["images"]


def test_an_error_is_posted_as_text_that_holds_json(worker: Worker) -> None:
    posted = through_the_sdk(worker, job(seed="x"))
    assert set(posted) == {"error"}
    assert json.loads(posted["error"])["field"] == "seed"


def test_the_event_loop_runs_on_while_a_job_does(monkeypatch: Any) -> None:
    class Slow:
        def run(self, _: Any) -> dict[str, Any]:
            time.sleep(0.3)
            return {"images": []}

    configs: list[dict[str, Any]] = []
    monkeypatch.setattr("runpod.serverless.start", configs.append)
    monkeypatch.setattr(sys, "argv", ["handler.py"])
    settings = Settings.from_env({"STANDALONE_MODE": "1", "API_HOST": "127.0.0.9"})
    serve(Slow(), settings)  # type: ignore[arg-type]
    assert sys.argv[-4:] == ["--rp_api_host", "127.0.0.9", "--rp_api_port", "8000"]

    async def beats() -> int:
        task = asyncio.create_task(configs[0]["handler"]({"id": "1", "input": {}}))
        count = 0
        while not task.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(beats()) >= 5


def test_standalone_mode_serves_http(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"STANDALONE_MODE": "1", "API_PORT": str(port), "MODEL": "mini"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "handler.py")],
        env=os.environ | variables,
        cwd=tmp_path,
        stdout=log,
        stderr=log,
    )
    health = [sys.executable, "-m", "image_worker.serve.health"]
    try:
        url = f"http://127.0.0.1:{port}/runsync"
        reply = _post_when_ready(url, {"input": job()["input"]})
        assert reply["status"] == "COMPLETED"
        assert reply["output"]["images"]
        bad = requests.post(url, json={"input": {"prompt": 1}}, timeout=30).json()
        assert json.loads(bad["error"])["type"] == "invalid_request"
        healthy = subprocess.run(health, env=os.environ | variables, check=False)
        assert healthy.returncode == 0
    finally:
        process.terminate()
        process.wait(20)
        log.close()
    gone = subprocess.run(health, env=os.environ | variables, check=False, capture_output=True)
    assert gone.returncode == 1


def test_health_says_nothing_of_a_queue_worker() -> None:
    """RunPod watches its workers itself; the container's check is for standalone mode."""
    done = subprocess.run([sys.executable, "-m", "image_worker.serve.health"], check=False)
    assert done.returncode == 0


def _post_when_ready(url: str, body: dict[str, Any]) -> Any:
    for _ in range(120):
        try:
            return requests.post(url, json=body, timeout=60).json()
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError("the server did not come up")
