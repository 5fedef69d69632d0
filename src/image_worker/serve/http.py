"""The standalone server: RunPod's job API, OpenAI's image API, metrics, and the playground.

A job is accepted, queued and watched here; what it is, and what becomes of it, is the worker's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from importlib import resources
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from image_worker import __version__
from image_worker.serve import http_jobs, http_openai
from image_worker.serve.http_server import (
    KEY,
    MAX_BODY,
    Server,
    TheServer,
    answer_errors,
    errors,
)
from image_worker.serve.jobs import Jobs
from image_worker.serve.metrics import Metrics
from image_worker.settings import Settings
from image_worker.worker import Worker

log = logging.getLogger(__name__)

_LINGER_SECONDS = 10.0  # after the last job, for answers that are still to be fetched

router = APIRouter()


def create_app(worker: Worker, settings: Settings) -> FastAPI:
    """The server for one worker."""
    app = FastAPI(
        title="Qwen-Image worker",
        version=__version__,
        description="Edits pictures by instruction. Jobs are those of RunPod's queue.",
        max_body_size=MAX_BODY,
    )
    app.state.server = Server(worker, settings)
    answer_errors(app)
    for routes in (http_jobs.router, http_openai.router, router):
        app.include_router(routes)
    document = functools.cache(lambda: _describe(app))
    app.openapi = document  # type: ignore[method-assign]
    return app


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the models that routes only name."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    template = "#/components/schemas/{model}"
    for model in (*http_jobs.MODELS, *http_openai.MODELS):
        schema = model.model_json_schema(ref_template=template)
        schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
    # FastAPI's own answer to a wrong parameter, which `answer_errors` makes a 400.
    del schemas["HTTPValidationError"], schemas["ValidationError"]
    for path in document["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    return document


@router.get("/health", responses={503: {"description": "the worker must be replaced"}})
async def health(server: TheServer) -> JSONResponse:
    """Whether the process works at all."""
    broken, entry = server.worker.broken, server.worker.entry
    state: dict[str, Any] = {"status": "broken" if broken else "ok"}
    state |= {"model": entry.name, "max_images": entry.max_images}
    return JSONResponse(state | server.worker.engine.counts(), 503 if broken else 200)


@router.get("/ready", responses={503: {"description": "no job would be taken now"}})
async def ready(server: TheServer) -> JSONResponse:
    """Whether a job would be taken now."""
    closed = server.stopping or server.worker.broken or server.jobs.full
    return JSONResponse({"ready": not closed}, 503 if closed else 200)


@router.get("/metrics", dependencies=[KEY], responses=errors(401), response_class=PlainTextResponse)
async def metrics(server: TheServer) -> PlainTextResponse:
    """For Prometheus."""
    return PlainTextResponse(server.metrics.text(), media_type=Metrics.MEDIA_TYPE)


@router.get("/", include_in_schema=False)
async def playground() -> HTMLResponse:
    """The page to try things out."""
    page = resources.files("image_worker.serve") / "playground.html"
    return HTMLResponse(page.read_text(encoding="utf-8"))


def serve(worker: Worker, settings: Settings) -> int:
    """Serves until the process is told to stop, or the worker is broken: exit status 1 then."""
    app = create_app(worker, settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_level=settings.log_level.lower(),
        access_log=settings.log_level == "DEBUG",
        timeout_graceful_shutdown=5,
    )
    log.info("serving on http://%s:%d", settings.api_host, settings.api_port)
    _Uvicorn(config, app.state.server).run()
    return 1 if worker.broken else 0


class _Uvicorn(uvicorn.Server):
    """Told to stop, it finishes the jobs it has, and leaves time for their answers to be fetched.

    Told a second time, it stops at once.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal, in the middle of anything."""
        if self._server.stopping or sig not in (signal.SIGTERM, signal.SIGINT):
            super().handle_exit(sig, frame)
        self._server.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._server.worker.broken:
            self._server.stopping = True
        if self._server.stopping and self._draining is None:
            self._draining = asyncio.create_task(self._drain(self._server.jobs))
        return await super().on_tick(counter)

    async def _drain(self, jobs: Jobs) -> None:
        log.info("stopping: %d jobs are still to be done", jobs.unfinished)
        had_jobs = jobs.unfinished > 0
        await jobs.drain()
        if had_jobs:
            await asyncio.sleep(_LINGER_SECONDS)
        self.should_exit = True
