"""How long large requests hold the server's event loop: `python -m image_worker.bench.loop_lag`.

Serves the miniature in this process, while a client in another one posts what is large or hostile.
A coroutine of the server's own loop sleeps for 5 ms at a time and notes how late it wakes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import requests

_SLEEP = 0.005
_LARGE_SIDE = 2400  # three such pictures of noise are just under the 50 MiB that a job may have
_ANSWER = ["A" * 2**24] * 4  # four pictures of 2048² pixels, in base64
_COLUMNS = ("request", "sent, MB", "received, MB", "outcome", "worst lag, ms")


def main() -> None:
    """Measures every request; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="each request is made")
    options = parser.parse_args()
    # Here, since the client's process, which imports this module, needs none of it.
    import uvicorn

    from image_worker.serve.http import create_app
    from image_worker.serve.process import favour_event_loop
    from image_worker.settings import Settings
    from image_worker.worker import Worker

    class Stuffed(Worker):
        """Answers jobs with a seed as if they had asked for the largest pictures."""

        async def run(self, job: Mapping[str, Any], *given: Any) -> dict[str, Any]:
            reply = await super().run(job, *given)
            if "error" in reply or "seed" not in job["input"]:
                return reply
            return reply | {"images": _ANSWER, "output_image_base64": _ANSWER[0]}

    settings = Settings.from_env({"MODEL": "mini", "STANDALONE_MODE": "1"})
    worker = Stuffed.from_settings(settings)
    favour_event_loop()
    config = uvicorn.Config(create_app(worker, settings), log_level="warning")
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_measure(uvicorn.Server(config), options.times))
    worker.close()


async def _measure(server: Any, times: int) -> None:
    loop, spawn = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool, socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve([listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        await loop.run_in_executor(pool, _send, url, "a small job")
        sys.stdout.write(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|\n")
        for name in _REQUESTS:
            lags: list[float] = []
            watcher = asyncio.create_task(_watch(lags))
            for _ in range(times):
                seen = await loop.run_in_executor(pool, _send, url, name)
            await asyncio.sleep(2 * _SLEEP)
            watcher.cancel()
            row = [name, *seen, f"{1000 * max(lags):.1f}"]
            sys.stdout.write(f"| {' | '.join(row)} |\n")
            sys.stdout.flush()
        server.should_exit = True
        await serving


async def _watch(lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        await asyncio.sleep(_SLEEP)
        lags.append(time.perf_counter() - start - _SLEEP)


# All below runs in the client's process.


def _send(url: str, name: str) -> tuple[str, str, str]:
    """Makes a request. Megabytes sent, megabytes received, and what came of it."""
    answer = _REQUESTS[name](url)
    sent = int(answer.request.headers.get("Content-Length", 0))
    return f"{sent / 1e6:.1f}", f"{len(answer.content) / 1e6:.1f}", _outcome(answer)


def _outcome(answer: requests.Response) -> str:
    if answer.headers["Content-Type"] != "application/json":
        return str(answer.status_code)
    found = answer.json()
    error = found.get("error", {})
    return str(error.get("message", found.get("status", answer.status_code)))


def _body(url: str, content: bytes) -> requests.Response:
    return requests.post(f"{url}/runsync", data=content, timeout=600)


def _job(url: str, **options: Any) -> requests.Response:
    given = {"prompt": "make the red circle blue", "num_inference_steps": 2, **options}
    return _body(url, json.dumps({"input": given}, ensure_ascii=False).encode())


def _form(url: str) -> requests.Response:
    fields = {"prompt": "make the red circle blue", "num_inference_steps": "2"}
    files = [("image[]", ("noise.png", _noise(_LARGE_SIDE)))] * 3
    return requests.post(f"{url}/v1/images/edits", fields, files=files, timeout=600)


def _stream(url: str) -> requests.Response:
    given: Any = {"prompt": "make the red circle blue", "image": _text(128), "seed": 1}
    job = requests.post(f"{url}/run", json={"input": given}, timeout=600).json()
    return requests.get(f"{url}/stream/{job['id']}", timeout=600)


@functools.cache
def _noise(side: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))
    noise.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _text(side: int) -> str:
    return base64.b64encode(_noise(side)).decode()


def _broken_lines() -> list[str]:
    return [base64.encodebytes(_noise(_LARGE_SIDE)).decode()] * 3


_REQUESTS: Mapping[str, Callable[[str], requests.Response]] = {
    "a small job": lambda url: _job(url, image=_text(128)),
    "three large pictures": lambda url: _job(url, images=[_text(_LARGE_SIDE)] * 3),
    "the same, a field misspelt": lambda url: _job(url, imagse=[_text(_LARGE_SIDE)] * 3),
    "the same, with line breaks": lambda url: _job(url, imagse=_broken_lines()),
    "the same as a form": _form,
    "one text of 70 MB": lambda url: _job(url, image="A" * 70_000_000),
    "a picture of accents": lambda url: _job(url, image="é" * 13_000_000),
    "a body of lists": lambda url: _body(url, b"[" + b"[]," * 23_000_000 + b"[]]"),
    "the most lists that are read": lambda url: _body(url, b"[" + b"[]," * 87_000 + b"[]]"),
    "a body of blanks": lambda url: _body(url, b" " * 70_000_000),
    "a large answer": lambda url: _job(url, image=_text(128), seed=1),
    "a large answer as a stream": _stream,
}


if __name__ == "__main__":
    main()
