"""The standalone server: RunPod's job API, OpenAI's image API, metrics, and the playground.

A job is accepted, queued and watched here; what it is, and what becomes of it, is the worker's.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import json
import logging
import signal
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from image_worker import __version__
from image_worker.errors import ErrorReply, InvalidRequest, WorkerError
from image_worker.job.images import MAX_BYTES
from image_worker.job.request import EditRequest
from image_worker.serve import openai_api
from image_worker.serve.jobs import Job, Jobs, QueueFull
from image_worker.serve.metrics import Metrics
from image_worker.settings import Settings
from image_worker.worker import Worker

log = logging.getLogger(__name__)

MAX_BODY = 4 * MAX_BYTES * 4 // 3 + 2**20  # four pictures in base64, and the rest of a job
_LINGER_SECONDS = 10.0  # after the last job, for answers that are still to be fetched


class JobRequest(BaseModel):
    """What RunPod's /run takes, but for webhook and policy, which nothing here would heed."""

    model_config = ConfigDict(extra="forbid")

    input: EditRequest = Field(description="the job")
    s3Config: dict[str, Any] | None = Field(None, description="where the pictures shall go")


class Accepted(BaseModel):
    id: str
    status: str


class Failure(BaseModel):
    """An error; `field` names the field at fault, if one is."""

    type: str
    message: str
    retryable: bool
    field: str | None = None


class ErrorBody(BaseModel):
    error: Failure


class JobView(BaseModel):
    """A job, as RunPod's API shows it; times in milliseconds."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: str
    delayTime: int
    executionTime: int | None = None
    progress: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    error: Failure | None = None


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the request is wrong; the error says where"},
    401: {"model": ErrorBody, "description": "the API key is missing or wrong"},
    413: {"model": ErrorBody, "description": "the request's body is too large"},
    429: {"model": ErrorBody, "description": "the queue is full; Retry-After says when to try"},
    503: {"model": ErrorBody, "description": "the server is stopping or broken; try another"},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    401: _ERRORS[401],
    404: {"model": ErrorBody, "description": "no job has this id, or its answer is kept no longer"},
}


class Refusal(Exception):
    """An answer other than 200, with an error as body."""

    def __init__(self, status: int, error: ErrorReply, headers: Mapping[str, str] = {}) -> None:
        super().__init__(error["message"])
        self.status, self.error, self.headers = status, error, headers


def _refusal(status: int, kind: str, message: str, **headers: str) -> Refusal:
    retryable = status in (429, 503)
    error: ErrorReply = {"type": kind, "message": message, "retryable": retryable}
    return Refusal(status, error, {name.replace("_", "-"): text for name, text in headers.items()})


class Server:
    """The application and what its routes share."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker = worker
        self.jobs = Jobs(worker, settings.queue_size)
        self.metrics = Metrics(worker, self.jobs)
        self.stopping = False
        self._key = settings.api_key

    def check_key(self, given: HTTPAuthorizationCredentials | None) -> None:
        """Compares in a time that does not tell how much of the key is right."""
        if self._key is None:
            return
        wanted = self._key.get_secret_value().encode()
        if given is None or not hmac.compare_digest(given.credentials.encode(), wanted):
            raise _refusal(
                401,
                "unauthorized",
                "this server wants an API key as bearer",
                WWW_Authenticate="Bearer",
            )

    async def submit(self, body: object, *, previews: bool = False) -> Job:
        """Checks a request, which is to be a `JobRequest`, and queues it."""
        if self.stopping or self.worker.broken:
            raise _refusal(503, "unavailable", "this server is stopping; try another")
        try:
            job = self.jobs.submit(await asyncio.to_thread(self._check, body), previews=previews)
        except WorkerError as error:
            raise Refusal(400, error.reply()) from None
        except QueueFull as full:
            message = f"{self.jobs.unfinished} jobs are waiting; try again later"
            seconds = str(full.retry_after)
            raise _refusal(429, "queue_full", message, Retry_After=seconds) from None
        assert job.task is not None
        job.task.add_done_callback(lambda _: self.metrics.observe(job))
        return job

    def _check(self, body: object) -> dict[str, Any]:
        """What can be said of a job without doing it."""
        if not isinstance(body, dict):
            raise InvalidRequest('a job is a JSON object with "input"')
        for name in body:
            if name not in JobRequest.model_fields:
                raise InvalidRequest("there is no such field", field=str(name)[:100])
        EditRequest.parse(body.get("input"), self.worker.entry)
        return body

    async def finish(self, job: Job, request: Request) -> Job:
        """Waits for a job; if its caller goes away meanwhile, the job is cancelled."""
        assert job.task is not None
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait([job.task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not job.done:
                await self.jobs.cancel(job)
            return job
        finally:
            gone.cancel()

    def find(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None:
            raise _refusal(404, "unknown_job", "no job has this id, or its answer was dropped")
        return job


async def _gone(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(worker: Worker, settings: Settings) -> FastAPI:
    """The server for one worker."""
    server = Server(worker, settings)
    app = FastAPI(
        title="Qwen-Image worker",
        version=__version__,
        description="Edits pictures by instruction. Jobs are those of RunPod's queue.",
    )
    app.state.server = server
    app.add_middleware(BodyLimit)
    app.exception_handler(Refusal)(_answer_refusal)
    app.exception_handler(RequestValidationError)(_answer_invalid)
    app.exception_handler(HTTPException)(_answer_http)
    _add_job_routes(app, server)
    _add_openai_routes(app, server)
    _add_operator_routes(app, server)
    document = functools.cache(lambda: _describe(app))
    app.openapi = document  # type: ignore[method-assign]
    return app


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


# Bodies are read by hand, off the event loop, since they can have a hundred megabytes.
_JOB = {"requestBody": {"required": True, "content": {"application/json": _schema("JobRequest")}}}


async def _json(request: Request) -> object:
    body = await request.body()
    try:
        return await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        raise Refusal(400, InvalidRequest("the body is not JSON").reply()) from None


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the models of the bodies that are read by hand."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    template = "#/components/schemas/{model}"
    for model in (JobRequest, Generation):
        schema = model.model_json_schema(ref_template=template)
        parts = {**schema.pop("$defs", {}), model.__name__: schema}
        document["components"]["schemas"].update(parts)
    return document


def _add_job_routes(app: FastAPI, server: Server) -> None:
    key = _key_of(server)

    @app.post("/run", dependencies=[key], responses=_ERRORS, tags=["jobs"], openapi_extra=_JOB)
    async def run(
        request: Request,
        previews: Annotated[bool, Query(description="show small pictures in /stream")] = False,
    ) -> Accepted:
        """Queues a job; /status or /stream tell what becomes of it."""
        job = await server.submit(await _json(request), previews=previews)
        return Accepted(id=job.id, status=job.status)

    shows_job: dict[str, Any] = {"dependencies": [key], "response_model": JobView, "tags": ["jobs"]}

    @app.post("/runsync", responses=_ERRORS, openapi_extra=_JOB, **shows_job)
    async def runsync(request: Request) -> JSONResponse:
        """Runs a job and answers with its result. Closing the connection cancels it."""
        job = await server.submit(await _json(request))
        return JSONResponse((await server.finish(job, request)).view())

    @app.get("/status/{job_id}", responses=_UNKNOWN, **shows_job)
    async def status(job_id: Annotated[str, Path()]) -> JSONResponse:
        """How far a job is, and its result when it is done, for half an hour."""
        return JSONResponse(server.find(job_id).view())

    @app.post("/cancel/{job_id}", responses=_UNKNOWN, **shows_job)
    async def cancel(job_id: Annotated[str, Path()]) -> JSONResponse:
        """Takes a job back, if it is not done."""
        job = server.find(job_id)
        await server.jobs.cancel(job)
        return JSONResponse(job.view())

    async def found(job_id: Annotated[str, Path()]) -> Job:
        return server.find(job_id)  # before the stream begins, while there can be a 404

    @app.get(
        "/stream/{job_id}",
        dependencies=[key],
        responses=_UNKNOWN,
        response_class=EventSourceResponse,
        tags=["jobs"],
    )
    async def stream(job: Job = Depends(found)) -> AsyncIterator[ServerSentEvent]:  # noqa: B008
        """Events `progress`, `preview` (a JPEG in base64) and, last, `done` with the job."""
        told: tuple[int, str | None] = (0, None)
        while True:
            changed = job.changed
            if job.progress.step != told[0]:
                yield ServerSentEvent(event="progress", data=job.progress.view())
            if job.preview is not None and job.preview != told[1]:
                yield ServerSentEvent(event="preview", data=job.preview)
            told = job.progress.step, job.preview
            if job.done:
                yield ServerSentEvent(event="done", data=job.view())
                return
            await changed.wait()


_TEXTS = ("prompt", "model", "size", "output_format", "negative_prompt")
_PICTURE = {"type": "string", "format": "binary"}
_EDIT_FORM = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {
        "image": {"type": "array", "items": _PICTURE, "description": "also as image[]"},
        "prompt": {"type": "string"},
        "model": {"type": "string"},
        "n": {"type": "integer"},
        "size": {"type": "string", "description": "auto, or as in 1024x768"},
        "output_format": {"enum": ["png", "jpeg", "webp"]},
        "output_compression": {"type": "integer"},
        "seed": {"type": "integer"},
        "num_inference_steps": {"type": "integer"},
        "true_cfg_scale": {"type": "number"},
        "negative_prompt": {"type": "string"},
    },
}


class Generation(BaseModel):
    """What OpenAI's /v1/images/generations takes; `openai_api.py` says what is possible."""

    model_config = ConfigDict(extra="allow")

    prompt: str


def _add_openai_routes(app: FastAPI, server: Server) -> None:
    key = _key_of(server)

    async def made(route: str, fields: object, request: Request) -> dict[str, Any]:
        try:
            job_input = openai_api.to_input(route, fields, server.worker.entry)
        except InvalidRequest as error:
            raise Refusal(400, error.reply()) from None
        job = await server.finish(await server.submit({"input": job_input}), request)
        reply = job.reply or {"error": {"type": "cancelled", "message": "", "retryable": True}}
        if "error" in reply:
            raise Refusal(_status_of(reply["error"]), reply["error"])
        return openai_api.answer(reply)

    @app.post(
        openai_api.EDITS,
        dependencies=[key],
        responses=_ERRORS,
        tags=["openai"],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": _EDIT_FORM}},
            }
        },
    )
    async def edits(request: Request) -> dict[str, Any]:
        """As OpenAI's: edits the pictures of a form."""
        return await made(openai_api.EDITS, await _form(request), request)

    @app.post(
        openai_api.GENERATIONS,
        dependencies=[key],
        responses=_ERRORS,
        tags=["openai"],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": _schema("Generation")},
            }
        },
    )
    async def generations(request: Request) -> dict[str, Any]:
        """As OpenAI's: a picture from a text, where the model makes them."""
        return await made(openai_api.GENERATIONS, await _json(request), request)

    @app.get("/v1/models", dependencies=[key], responses={401: _ERRORS[401]}, tags=["openai"])
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        name = server.worker.entry.name
        one = {"id": name, "object": "model", "created": 0, "owned_by": "qwen"}
        return {"object": "list", "data": [one]}


async def _form(request: Request) -> dict[str, Any]:
    """A form's fields, numbers as numbers, files as base64."""
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=16, max_fields=64) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if isinstance(value, UploadFile):
                    data = base64.b64encode(await value.read()).decode("ascii")
                    fields.setdefault(name, []).append({"base64": data})
                else:
                    fields[name] = value if name in _TEXTS else _number(value)
    except HTTPException:
        raise Refusal(400, InvalidRequest("the request is not a form").reply()) from None
    return fields


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _status_of(error: ErrorReply) -> int:
    """OpenAI's clients try again by themselves what has a status from 500."""
    if error["retryable"]:
        return 503
    return 400 if error["type"].startswith("invalid") else 422


def _add_operator_routes(app: FastAPI, server: Server) -> None:
    key = _key_of(server)

    @app.get("/health", responses={503: {"description": "the worker must be replaced"}})
    async def health() -> JSONResponse:
        """Whether the process works at all."""
        broken, entry = server.worker.broken, server.worker.entry
        state: dict[str, Any] = {"status": "broken" if broken else "ok"}
        state |= {"model": entry.name, "max_images": entry.max_images}
        return JSONResponse(state | server.worker.engine.counts(), 503 if broken else 200)

    @app.get("/ready", responses={503: {"description": "no job would be taken now"}})
    async def ready() -> JSONResponse:
        """Whether a job would be taken now."""
        closed = server.stopping or server.worker.broken or server.jobs.full
        return JSONResponse({"ready": not closed}, 503 if closed else 200)

    @app.get(
        "/metrics",
        dependencies=[key],
        responses={401: _ERRORS[401]},
        response_class=PlainTextResponse,
    )
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(server.metrics.text(), media_type=Metrics.MEDIA_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        page = resources.files("image_worker.serve") / "playground.html"
        return HTMLResponse(page.read_text(encoding="utf-8"))


_BEARER = HTTPBearer(auto_error=False, description="API_KEY, if the server has one")


def _key_of(server: Server) -> Any:
    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        server.check_key(given)

    return Depends(check)


class BodyLimit:
    """Refuses bodies over `MAX_BODY` bytes, by their header or as soon as they are longer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > MAX_BODY:
            refusal = _refusal(413, "too_large", f"a body may have {MAX_BODY // 2**20} MiB")
            await _body(refusal, scope["path"])(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MAX_BODY:
                raise _refusal(413, "too_large", f"a body may have {MAX_BODY // 2**20} MiB")
            return message

        await self._app(scope, limited, send)


def _body(refusal: Refusal, path: str) -> JSONResponse:
    is_openai = path.startswith("/v1/")
    content = openai_api.error_body(refusal.error) if is_openai else {"error": refusal.error}
    return JSONResponse(content, refusal.status, dict(refusal.headers))


async def _answer_refusal(request: Request, refusal: Any) -> JSONResponse:
    return _body(refusal, request.url.path)


async def _answer_invalid(request: Request, error: Any) -> JSONResponse:
    problem = jsonable_encoder(error.errors()[0], exclude={"ctx", "input", "url"})
    where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query"))[:200]
    found = InvalidRequest(f"{where}: {problem['msg']}"[:500], field=where or None)
    return _body(Refusal(400, found.reply()), request.url.path)


async def _answer_http(request: Request, error: Any) -> JSONResponse:
    found: ErrorReply = {"type": "http", "message": str(error.detail), "retryable": False}
    return _body(Refusal(error.status_code, found, error.headers or {}), request.url.path)


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
