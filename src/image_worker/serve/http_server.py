"""What all routes of the standalone server share: the server itself, its errors, its limits."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from image_worker.errors import ErrorReply, InvalidRequest, WorkerError
from image_worker.job.images import MAX_BYTES
from image_worker.job.request import EditRequest
from image_worker.serve import large_json, openai_api
from image_worker.serve.jobs import Job, Jobs, QueueFull
from image_worker.serve.metrics import Metrics
from image_worker.settings import Settings
from image_worker.worker import Worker

MAX_BODY = 4 * MAX_BYTES * 4 // 3 + 2**20  # four pictures in base64, and the rest of a job

_ERRORS = {
    400: "the request is wrong; the error says where",
    401: "the API key is missing or wrong",
    404: "no job has this id, or its answer is kept no longer",
    413: "the request's body is too large",
    422: "the request is right, and cannot be done",
    429: "the queue is full; Retry-After says when to try",
    503: "the server is stopping or broken; try another",
}


class JobRequest(BaseModel):
    """What RunPod's /run takes, but for webhook and policy, which nothing here would heed."""

    model_config = ConfigDict(extra="forbid")

    input: EditRequest = Field(description="the job")
    s3Config: dict[str, Any] | None = Field(None, description="where the pictures shall go")


class Failure(BaseModel):
    """An error; `field` names the field at fault, if one is."""

    type: str
    message: str
    retryable: bool
    field: str | None = None


class ErrorBody(BaseModel):
    error: Failure


def body_of(model: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """How routes document a body. `http.py` adds the models to the document."""
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def takes(content: Mapping[str, Any]) -> dict[str, Any]:
    """How routes document bodies that they read by hand: FastAPI would parse them on the loop."""
    return {"requestBody": {"required": True, "content": content}}


def errors(*statuses: int, body: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """How routes document the errors that they answer with."""
    found = body_of(body)  # a "model" would get the media type of the route's right answers
    return {status: {"description": _ERRORS[status], "content": found} for status in statuses}


class Refusal(Exception):
    """An answer other than 200, with an error as body."""

    def __init__(self, status: int, error: ErrorReply, headers: Mapping[str, str] = {}) -> None:
        super().__init__(error["message"])
        self.status, self.error, self.headers = status, error, headers


def refusal(status: int, kind: str, message: str, **headers: str) -> Refusal:
    """One that no job is to blame for."""
    retryable = status in (429, 503)
    error: ErrorReply = {"type": kind, "message": message, "retryable": retryable}
    return Refusal(status, error, {name.replace("_", "-"): text for name, text in headers.items()})


class Server:
    """A worker, its jobs, and whether more are taken."""

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
            message = "this server wants an API key as bearer"
            raise refusal(401, "unauthorized", message, WWW_Authenticate="Bearer")

    async def submit(self, body: object, *, previews: bool = False) -> Job:
        """Checks a request, which is to be a `JobRequest`, and queues it."""
        try:
            checked = await asyncio.to_thread(self._check, body)
            # Only now: it may have been told to stop meanwhile.
            if self.stopping or self.worker.broken:
                raise refusal(503, "unavailable", "this server is stopping; try another")
            job = self.jobs.submit(checked, previews=previews)
        except WorkerError as error:
            raise Refusal(400, error.reply()) from None
        except QueueFull as full:
            message = f"{self.jobs.unfinished} jobs are waiting; try again later"
            seconds = str(full.retry_after)
            raise refusal(429, "queue_full", message, Retry_After=seconds) from None
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
        """The job of an id."""
        job = self.jobs.get(job_id)
        if job is None:
            raise refusal(404, "unknown_job", "no job has this id, or its answer was dropped")
        return job


async def _gone(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(_of)]
_BEARER = HTTPBearer(auto_error=False, description="API_KEY, if the server has one")


async def _check_key(
    server: TheServer, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> None:
    server.check_key(given)


KEY = Depends(_check_key)


async def read_json(request: Request) -> object:
    """A request's body, parsed on a thread: it can have a hundred megabytes."""
    chunks = [chunk async for chunk in request.stream()]
    try:
        return await asyncio.to_thread(large_json.parse, chunks)
    except large_json.TooLarge as error:
        raise refusal(413, "too_large", str(error)) from None
    except (ValueError, RecursionError):
        raise Refusal(400, InvalidRequest("the body is not JSON").reply()) from None


def answer_errors(app: FastAPI) -> None:
    """Every error of `app` is answered as JSON, in OpenAI's terms on OpenAI's routes."""
    app.exception_handler(Refusal)(_answer_refusal)
    app.exception_handler(RequestValidationError)(_answer_invalid)
    app.exception_handler(HTTPException)(_answer_http)


def _answer(refused: Refusal, path: str) -> JSONResponse:
    is_openai = path.startswith("/v1/")
    content = openai_api.error_body(refused.error) if is_openai else {"error": refused.error}
    return JSONResponse(content, refused.status, dict(refused.headers))


async def _answer_refusal(request: Request, refused: Any) -> JSONResponse:
    return _answer(refused, request.url.path)


async def _answer_invalid(request: Request, error: Any) -> JSONResponse:
    problem = jsonable_encoder(error.errors()[0], exclude={"ctx", "input", "url"})
    where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query"))[:200]
    found = InvalidRequest(f"{where}: {problem['msg']}"[:500], field=where or None)
    return _answer(Refusal(400, found.reply()), request.url.path)


async def _answer_http(request: Request, error: Any) -> JSONResponse:
    """What Starlette finds: no such route or method; a body that is no form, or is too long."""
    kind = {400: "invalid_request", 413: "too_large"}.get(error.status_code, "http")
    too_large = f"a body may have {MAX_BODY // 2**20} MiB"
    message = too_large if error.status_code == 413 else str(error.detail)
    found: ErrorReply = {"type": kind, "message": message, "retryable": False}
    return _answer(Refusal(error.status_code, found, error.headers or {}), request.url.path)
