"""Jobs of the standalone server, from submission until their answers have been kept long enough."""

from __future__ import annotations

import asyncio
import io
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pybase64
from PIL import Image

from image_worker.serve.progress import Progress
from image_worker.worker import Worker

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
KEEP_SECONDS = 1800  # as long as RunPod keeps the answers of /run
KEEP_BYTES = 2**30


class QueueFull(Exception):
    """No further job is taken; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One job. `changed` is set, and replaced, whenever something about it is new."""

    id: str
    status: Status = "IN_QUEUE"
    progress: Progress = field(default_factory=Progress)
    preview: str | None = None
    reply: dict[str, Any] | None = None
    created: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""
        return self.ended is not None

    @property
    def bytes(self) -> int:
        """About what its answer takes."""
        pictures = (self.reply or {}).get("images", [])
        return sum(len(picture) for picture in pictures)

    def view(self) -> dict[str, Any]:
        """As RunPod's API shows a job; times are in milliseconds."""
        now = time.monotonic()
        seen: dict[str, Any] = {"id": self.id, "status": self.status}
        seen["delayTime"] = _milliseconds(self.created, self.began or self.ended or now)
        if self.began is not None:
            seen["executionTime"] = _milliseconds(self.began, self.ended or now)
        if self.status == "IN_PROGRESS" and self.progress.of:
            seen["progress"] = self.progress.view()
        if self.reply is not None:
            failed = self.status == "FAILED"
            seen.update({"error": self.reply["error"]} if failed else {"output": self.reply})
        return seen

    def tell(self) -> None:
        """Wakes whoever waits for news."""
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """All jobs, by id. Everything here runs on the event loop."""

    def __init__(self, worker: Worker, most: int) -> None:
        """most: jobs that may be unfinished at a time."""
        self._worker = worker
        self._most = most
        self._jobs: dict[str, Job] = {}

    @property
    def unfinished(self) -> int:
        """Jobs that are waiting or running."""
        return sum(not job.done for job in self._jobs.values())

    @property
    def full(self) -> bool:
        return self.unfinished >= self._most

    def submit(self, job: Mapping[str, Any], *, previews: bool = False) -> Job:
        """Begins a job, `{"input", …}`.

        Raises:
            QueueFull: too many are unfinished.
        """
        self._forget()
        if self.full:
            raise QueueFull(self._seconds_until_free())
        made = Job(uuid.uuid4().hex)
        self._jobs[made.id] = made
        made.task = asyncio.create_task(self._run(made, {**job, "id": made.id}, previews))
        return made

    def get(self, job_id: str) -> Job | None:
        """The job of an id, if there is one or its answer is still kept."""
        self._forget()
        return self._jobs.get(job_id)

    async def cancel(self, job: Job) -> None:
        """Takes a job back; nothing happens to one that is done."""
        if job.task is not None and not job.done:
            job.task.cancel()
            await asyncio.wait([job.task])

    async def drain(self) -> None:
        """Returns when no job is unfinished."""
        while tasks := [job.task for job in self._jobs.values() if job.task and not job.done]:
            await asyncio.wait(tasks)

    async def _run(self, job: Job, given: Mapping[str, Any], previews: bool) -> None:
        def progress(step: int, of: int) -> None:
            if job.done:  # cancelled, and the step that it was in has ended since
                return
            if job.began is None:
                job.began = time.monotonic()
            job.status = "IN_PROGRESS"
            job.progress.told(step, of)
            job.tell()

        def preview(picture: Image.Image) -> None:
            if job.done:
                return
            job.preview = _small_file(picture)
            job.tell()

        try:
            job.reply = await self._worker.run(given, progress, preview if previews else None)
            job.status = "FAILED" if "error" in job.reply else "COMPLETED"
        except asyncio.CancelledError:
            job.status = "CANCELLED"
        finally:
            job.ended = time.monotonic()
            job.tell()

    def _forget(self) -> None:
        """Drops the oldest answers, for their age or when all together are too large."""
        finished = [job for job in self._jobs.values() if job.done]
        total, now = sum(job.bytes for job in finished), time.monotonic()
        for job in sorted(finished, key=lambda job: job.ended or now):
            if total <= KEEP_BYTES and now - (job.ended or now) <= KEEP_SECONDS:
                break
            total -= job.bytes
            del self._jobs[job.id]

    def _seconds_until_free(self) -> int:
        """From how long jobs take at present: at least one second, at most a minute."""
        times = [job.ended - job.created for job in self._jobs.values() if job.ended is not None]
        return max(1, min(60, round(sorted(times)[len(times) // 2]))) if times else 5


def _milliseconds(start: float, end: float) -> int:
    return round(1000 * (end - start))


def _small_file(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return pybase64.b64encode_as_string(buffer.getvalue())
