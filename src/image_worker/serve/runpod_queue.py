"""RunPod's queue, through its SDK, and the SDK's HTTP server for a machine of one's own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

import runpod
from runpod.serverless.modules.rp_logger import RunPodLogger

from image_worker.settings import Settings
from image_worker.worker import Worker

_LOG_LEVELS = {"DEBUG": "DEBUG", "INFO": "INFO", "WARNING": "WARN", "ERROR": "ERROR"}


def serve(worker: Worker, settings: Settings) -> None:
    """Takes jobs until the process is told to stop.

    With `STANDALONE_MODE` it serves POST /runsync on `API_HOST`:`API_PORT` instead of the queue.
    """
    if settings.standalone_mode:
        # The SDK takes these from the command line only.
        sys.argv += ["--rp_serve_api", "--rp_api_host", settings.api_host]
        sys.argv += ["--rp_api_port", str(settings.api_port)]

    # The SDK's own log has whole jobs and replies in it at DEBUG, its default.
    RunPodLogger().set_level(_LOG_LEVELS[settings.log_level])

    async def handler(job: Mapping[str, Any]) -> dict[str, Any]:
        # In a thread: the SDK pings and takes jobs on the event loop meanwhile.
        return for_sdk(await asyncio.to_thread(worker.run, job))

    runpod.serverless.start({"handler": handler})


def for_sdk(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply as the SDK wants it: its `error` is a text, so an error travels as JSON in a text."""
    if "error" not in reply:
        return reply
    return {**reply, "error": json.dumps(reply["error"], ensure_ascii=False)}
