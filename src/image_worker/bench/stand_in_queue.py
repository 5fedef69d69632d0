"""A stand-in for RunPod's queue, on loopback: what its SDK asks for, and faults on demand.

It notes every request with its time. A job counts as handed out when its answer is on its way to a
poll that is still open. It serves on a thread of its own; its methods may be called from any.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

POD = "stand-in-pod"
_TICK = 0.005
_MAX_BODY = 64 * 2**20


@dataclass(frozen=True)
class Seen:
    """A request, or a job on its way: what, when, which job, and what came with it.

    what: put, poll, handed, posted (an answer that was taken), refused, progress, stop, ping.
    """

    what: str
    moment: float
    job: str = ""
    body: Any = None


@dataclass
class Faults:
    """What goes wrong, until it is taken out again.

    takes: statuses or texts for the next takes; posts: job → statuses for its next posts, 0 for a
    connection that is closed; always: statuses for all posts of a job; lag, drip: seconds before
    the head of an answer that has jobs, and between its head and its body.
    """

    takes: deque[int | str] = field(default_factory=deque)
    posts: dict[str, deque[int]] = field(default_factory=dict)
    always: dict[str, int] = field(default_factory=dict)
    lag: float = 0.0
    drip: float = 0.0


class StandInQueue:
    """The queue of one endpoint, with one worker. Use it in a `with`."""

    def __init__(self, poll_seconds: float = 60) -> None:
        """poll_seconds: how long a poll without an answer is held open."""
        self.poll_seconds = poll_seconds
        self.faults = Faults()
        self.seen: list[Seen] = []
        self._jobs: deque[dict[str, Any]] = deque()
        self._stops: deque[str] = deque()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()])
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def environment(self) -> dict[str, str]:
        """What RunPod sets for a worker of this queue. The SDK's checks of the machine are off."""
        base = f"http://127.0.0.1:{self._port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_AI_API_KEY": "none",
            "RUNPOD_POD_ID": POD,
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def put(self, *jobs: Mapping[str, Any]) -> None:
        """Jobs for the worker, `{"id", "input"}`."""
        for job in jobs:
            self._note("put", job["id"])
        self._jobs.extend(dict(job) for job in jobs)

    def stop(self, job_id: str) -> None:
        """Cancels a job that the worker has."""
        self._stops.append(job_id)

    def of(self, what: str, job_id: str | None = None) -> list[Seen]:
        """What was seen of a kind, and of a job, in order."""
        return [s for s in self.seen if s.what == what and job_id in (None, s.job)]

    def answer(self, job_id: str, timeout: float = 60) -> Any:
        """Waits for a job's answer."""
        self.wait(lambda: bool(self.of("posted", job_id)), timeout, f"no answer to {job_id}")
        return self.of("posted", job_id)[0].body

    def wait(self, condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
        """Waits until something seen makes `condition` true.

        Raises:
            TimeoutError: it did not, and `otherwise` says what is missing.
        """
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(otherwise)

    def _note(self, what: str, job_id: str = "", body: Any = None) -> None:
        with self._changed:
            self.seen.append(Seen(what, time.monotonic(), job_id, body))
            self._changed.notify_all()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=_MAX_BODY)
        prefix = "/v2/endpoint"
        app.router.add_get(prefix + "/job-take/{pod}", self._take)
        app.router.add_get(prefix + "/job-take-batch/{pod}", self._take)
        app.router.add_get(prefix + "/job-stop/{pod}", self._stop)
        app.router.add_get(prefix + "/ping/{pod}", self._ping)
        app.router.add_post(prefix + "/job-done/{pod}/{job}", self._done)
        app.router.add_post(prefix + "/job-stream/{pod}/{job}", self._done)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._over.wait()
        await runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self._note("poll")
        if self.faults.takes:
            return _fault(self.faults.takes.popleft())
        if not await self._hold(request, self._jobs):
            return web.Response(status=204)
        batch = "batch_size" in request.query
        wanted = int(request.query.get("batch_size", 1))
        jobs = [self._jobs.popleft() for _ in range(min(wanted, len(self._jobs)))]
        for job in jobs:
            self._note("handed", job["id"])
        body = json.dumps(jobs if batch else jobs[0]).encode()
        await asyncio.sleep(self.faults.lag)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[:1])
        await asyncio.sleep(self.faults.drip)
        await response.write(body[1:])
        return response

    async def _stop(self, request: web.Request) -> web.Response:
        if not await self._hold(request, self._stops):
            return web.Response(status=204)
        stops = [self._stops.popleft() for _ in range(len(self._stops))]
        for job_id in stops:
            self._note("stop", job_id)
        return web.json_response({"jobsToStop": stops})

    async def _hold(self, request: web.Request, awaited: Sequence[Any]) -> bool:
        """Holds a poll open. Whether there is something for it now, and it is still open."""
        end = time.monotonic() + self.poll_seconds
        while not awaited and time.monotonic() < end and not self._over.is_set():
            await asyncio.sleep(_TICK)
            if _gone(request):
                return False
        return bool(awaited) and not _gone(request)

    async def _ping(self, request: web.Request) -> web.Response:
        self._note("ping", body=request.query.get("job_id", ""))
        return web.Response()

    async def _done(self, request: web.Request) -> web.Response:
        job_id = request.match_info["job"]
        text = await request.text()
        coming = self.faults.posts.get(job_id)
        status = coming.popleft() if coming else self.faults.always.get(job_id, 200)
        body = json.loads(text)
        if status != 200:
            self._note("refused", job_id, body)
            if not status and request.transport:
                request.transport.abort()
            return web.Response(status=status or 500)
        is_progress = isinstance(body, dict) and body.get("status") == "IN_PROGRESS"
        self._note("progress" if is_progress else "posted", job_id, body)
        return web.Response()


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _fault(fault: int | str) -> web.Response:
    if isinstance(fault, int):
        return web.Response(status=fault)
    return web.Response(text=fault, content_type="application/json")
