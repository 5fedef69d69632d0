"""The routes for jobs, as RunPod's API has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from image_worker.serve import large_json
from image_worker.serve.http_server import (
    KEY,
    ErrorBody,
    Failure,
    JobRequest,
    TheServer,
    body_of,
    errors,
    read_json,
    takes,
)
from image_worker.serve.jobs import Job

_STREAM = "text/event-stream"
_PING_SECONDS = 15.0  # of silence, after which something between here and the caller may hang up


class Accepted(BaseModel):
    id: str
    status: str


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


class Event(BaseModel):
    """A server-sent event: how far the job is, a JPEG in base64, or the job; each as JSON."""

    event: Literal["progress", "preview", "done"]
    data: str


MODELS = (JobRequest, ErrorBody, Event)  # that routes only name in the document
router = APIRouter(tags=["jobs"], dependencies=[KEY])
_JOB = takes(body_of(JobRequest))
_ERRORS = errors(400, 401, 413, 429, 503)
_UNKNOWN = errors(401, 404)
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "events, to the job's end", "content": body_of(Event, _STREAM)}
}


@router.post("/run", responses=_ERRORS, openapi_extra=_JOB)
async def run(
    server: TheServer,
    request: Request,
    previews: Annotated[bool, Query(description="show small pictures in /stream")] = False,
) -> Accepted:
    """Queues a job; /status or /stream tell what becomes of it."""
    job = await server.submit(await read_json(request), previews=previews)
    return Accepted(id=job.id, status=job.status)


@router.post("/runsync", responses=_ERRORS, openapi_extra=_JOB, response_model=JobView)
async def runsync(server: TheServer, request: Request) -> StreamingResponse:
    """Runs a job and answers with its result. Closing the connection cancels it."""
    job = await server.submit(await read_json(request))
    return large_json.answer((await server.finish(job, request)).view())


@router.get("/status/{job_id}", responses=_UNKNOWN, response_model=JobView)
async def status(server: TheServer, job_id: str) -> StreamingResponse:
    """How far a job is, and its result when it is done, for half an hour."""
    return large_json.answer(server.find(job_id).view())


@router.post("/cancel/{job_id}", responses=_UNKNOWN, response_model=JobView)
async def cancel(server: TheServer, job_id: str) -> StreamingResponse:
    """Takes a job back, if it is not done."""
    job = server.find(job_id)
    await server.jobs.cancel(job)
    return large_json.answer(job.view())


@router.get("/stream/{job_id}", responses=_UNKNOWN | _EVENTS, response_class=StreamingResponse)
async def stream(server: TheServer, job_id: str) -> StreamingResponse:
    """Events `progress`, `preview` (a JPEG in base64) and, last, `done` with the job."""
    # Nothing on the way shall keep events, or hold them back.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(server.find(job_id)), headers=headers, media_type=_STREAM)


async def _events(job: Job) -> AsyncIterator[bytes]:
    told: tuple[int, str | None] = (0, None)
    while True:
        changed, done = job.changed, job.done
        news = []
        if job.progress.step != told[0]:
            news.append(_event("progress", job.progress.view()))
        if job.preview is not None and job.preview != told[1]:
            news.append(_event("preview", job.preview))
        if done:
            news.append(_event("done", job.view()))
        told = job.progress.step, job.preview
        for texts in news:
            async for piece in large_json.send(texts):
                yield piece
        if done:
            return
        try:
            await asyncio.wait_for(changed.wait(), _PING_SECONDS)
        except TimeoutError:
            yield b": ping\n\n"


def _event(name: str, data: object) -> list[str]:
    first, *others = large_json.parts(data)
    return [f"event: {name}\ndata: {first}", *others, "\n\n"]
