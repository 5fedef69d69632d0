"""A worker that needs no model and does what its jobs say, served as the real one is.

`python -m tests.serve.stub_worker`, with the queue in the environment. Results are posted for less
long than in earnest.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import ClientConnectionError
from aiohttp_retry import ExponentialRetry

from image_worker.errors import CardLost
from image_worker.serve import runpod_queue
from image_worker.settings import Settings


class StubWorker:
    """Sleeps for a job's `seconds`, then answers with its `answer`."""

    broken = False

    async def run(
        self, job: Mapping[str, Any], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        given = job["input"]
        await asyncio.sleep(given.get("seconds", 0))
        answers: dict[str, dict[str, Any]] = {
            "bytes": {"images": b"not text"},
            "nan": {"seed": float("nan")},
            "surrogate": {"prompt": "\ud800"},
        }
        if given.get("answer") == "break":
            self.broken = True
            return {"error": CardLost("the card failed").reply()}
        return answers.get(given.get("answer", ""), {"seed": 1})


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    runpod_queue.POST_RETRY = ExponentialRetry(
        attempts=3, start_timeout=0.1, exceptions={ClientConnectionError}
    )
    sys.exit(runpod_queue.serve(StubWorker(), Settings.from_env()))  # type: ignore[arg-type]
