"""RunPod's queue, through its SDK.

The SDK's own code takes jobs, pings and drains. `_Jobs` extends its scaler where a job could be
lost, a slot wasted or a result dropped; each place says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import runpod
from aiohttp import ClientConnectionError, ClientError, ClientResponse, ClientSession, ClientTimeout
from aiohttp_retry import ExponentialRetry, RetryClient
from runpod.serverless.modules import rp_http, rp_ping, rp_scale
from runpod.serverless.modules.rp_job import get_job, run_job
from runpod.serverless.modules.rp_logger import RunPodLogger

from image_worker.errors import InternalError
from image_worker.serve import large_json, openai_api
from image_worker.serve.progress import Progress
from image_worker.settings import Settings

if TYPE_CHECKING:  # it imports torch, and this module does not
    from image_worker.worker import Worker

log = logging.getLogger(__name__)

LEAST_SLOTS = 4
# A result is tried for about five minutes, longer where the queue lets a try hang. Only an answer
# that would be the same next time ends it before.
POST_RETRY = ExponentialRetry(
    attempts=14,
    start_timeout=0.5,
    max_timeout=30,
    statuses={408, 425, 429},
    exceptions={ClientConnectionError, TimeoutError},
)
_POST_TIMEOUT = ClientTimeout(60)  # of one try
_TELL_TIMEOUT = ClientTimeout(3)  # of a progress update; a result may wait for it
_TELL_SECONDS = 1.0  # between two of them
_LEAST_TAKE_SECONDS = 1.0
_ON_ITS_WAY_SECONDS = 0.5  # for an answer that the queue sent before the worker was to stop
_SDK_PING = rp_ping.Heartbeat.process_loop
_LOG_LEVELS = {"DEBUG": "DEBUG", "INFO": "INFO", "WARNING": "WARN", "ERROR": "ERROR"}


def serve(worker: Worker, settings: Settings) -> int:
    """Takes jobs until the process is told to stop or the worker is broken.

    Jobs in flight are answered first. With `--rp_serve_api` on the command line the SDK serves its
    HTTP instead. Returns the exit status: 1 if the process must be replaced.
    """
    # The SDK's own log has whole jobs and replies in it at DEBUG, its default.
    RunPodLogger().set_level(_LOG_LEVELS[settings.log_level])

    def the_worker_is_well() -> None:
        if worker.broken:
            raise RuntimeError("the worker was lost before its first job")

    runpod.serverless.register_fitness_check(the_worker_is_well)

    async def handler(job: Mapping[str, Any]) -> dict[str, Any]:
        return for_sdk(await openai_api.run(worker, job))

    rp_scale.JobScaler = _Jobs
    rp_ping.Heartbeat.process_loop = staticmethod(_ping)
    # The batch that runs, and the next one. It must not vary: the SDK changes it only when idle.
    slots = max(LEAST_SLOTS, 2 * settings.batch_size)
    runpod.serverless.start(
        {"handler": handler, "worker": worker, "concurrency_modifier": lambda _: slots}
    )
    return 1 if worker.broken else 0


def for_sdk(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply as the SDK wants it: its `error` is a text, so an error travels as JSON in a text."""
    if "error" not in reply:
        return reply
    return {**reply, "error": json.dumps(reply["error"], ensure_ascii=False)}


class _Jobs(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK has no types
    """The SDK's loops that take, run and stop jobs."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.worker: Worker = config["worker"]
        self.jobs_fetcher = self._take
        self.jobs_handler = self._answer
        self._freed = asyncio.Event()

    async def set_scale(self) -> None:
        """Called before each take. Waits for a free slot, for which the SDK looks once a second."""
        await super().set_scale()
        while self.current_occupancy() >= self.current_concurrency:
            self._freed.clear()
            await self._freed.wait()

    def current_occupancy(self) -> int:
        """Jobs taken and not yet answered. The SDK counts those twice that have no task yet."""
        count: int = self.job_progress.get_job_count()
        return count

    async def get_jobs(self, session: ClientSession) -> None:
        """Takes jobs, until the worker is to stop."""
        await super().get_jobs(_Polls(session, self._shutdown_event))
        # run_jobs has ended by now if a take came together with the signal; its jobs are ours.
        await self.run_jobs(session)

    async def monitor_stop_signals(self, session: ClientSession) -> None:
        """Stops jobs that are cancelled, until the worker is to stop."""
        await super().monitor_stop_signals(_Polls(session, self._shutdown_event))

    async def stop_job(self, job_id: str) -> bool:
        """Cancels a job's task."""
        # A job that was just taken has no task until the SDK's next tick, after 0.1 s, and would
        # run all the same. A task that is cancelled before its first step never frees its slot.
        await asyncio.sleep(0.2)
        stopped: bool = await super().stop_job(job_id)
        return stopped

    async def handle_job(self, session: ClientSession, job: dict[str, Any]) -> None:
        """One job, from its task's first step to its slot's release."""
        try:
            await super().handle_job(session, job)
        finally:
            self._freed.set()

    async def _take(self, session: ClientSession, free: int) -> list[dict[str, Any]]:
        """The SDK's fetcher, less what is no job: that would end the SDK's loop, and all with it.

        A take that brings nothing lasts a second at least, or a queue that is down would be asked
        thousands of times a second.
        """
        start, jobs = time.monotonic(), []
        try:
            for job in await get_job(session, free) or []:
                if isinstance(job, dict) and isinstance(job.get("id"), str):
                    jobs.append(job)
                else:
                    log.error("the queue sent something that is no job; it is left out")
        finally:
            if not jobs and self.is_alive():
                await asyncio.sleep(start + _LEAST_TAKE_SECONDS - time.monotonic())
        return jobs

    async def _answer(self, session: ClientSession, _: object, job: dict[str, Any]) -> None:
        """Runs a job and posts its result, in place of the SDK's `handle_job`.

        Until the queue has the result, or `POST_RETRY` is over, the job keeps its slot: a worker
        whose results are not taken soon takes no more jobs.
        """
        result = await run_job(partial(self._run, session), job)
        try:
            body = _encode(result)
        except (TypeError, ValueError):
            log.exception("job %s: its reply is not JSON", job["id"])
            error = InternalError("the worker failed; its log has the details")
            body = _encode(for_sdk({"error": error.reply()}))
        try:
            client = RetryClient(session, retry_options=POST_RETRY)
            async with client.post(timeout=_POST_TIMEOUT, **_post(job, body)) as response:
                response.raise_for_status()
        except (ClientError, TimeoutError) as error:
            log.error("job %s: the queue did not take its result, now lost: %r", job["id"], error)

    async def _run(self, session: ClientSession, job: dict[str, Any]) -> dict[str, Any]:
        async with _Telling(partial(self._tell, session, job)) as telling:
            reply = for_sdk(await openai_api.run(self.worker, job, telling))
        if self.worker.broken:
            self.kill_worker()
            reply["refresh_worker"] = True  # RunPod replaces the worker, too
        return reply

    async def _tell(
        self, session: ClientSession, job: dict[str, Any], progress: dict[str, Any]
    ) -> None:
        body = _encode({"status": "IN_PROGRESS", "output": progress})
        try:
            async with session.post(timeout=_TELL_TIMEOUT, **_post(job, body)) as response:
                response.raise_for_status()
        except (ClientError, TimeoutError) as error:
            log.debug("job %s: the queue did not take its progress: %r", job["id"], error)


class _Polls:
    """The SDK's session for its long polls, which end unanswered when the worker is to stop.

    An answer that was on its way then is waited for, and read to its end: it may be a job, and then
    it is ours.
    """

    def __init__(self, session: ClientSession, stop: asyncio.Event) -> None:
        self._session = session
        self._stop = stop

    @asynccontextmanager
    async def get(self, url: str) -> AsyncIterator[ClientResponse]:
        """As `ClientSession.get`; raises TimeoutError, which the SDK expects, at the stop."""
        if self._stop.is_set():
            raise TimeoutError
        head = asyncio.ensure_future(self._session.get(url))
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({head, stop}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({head}, timeout=_ON_ITS_WAY_SECONDS)
            if not head.done():
                raise TimeoutError
            async with await head as response:
                yield response
        finally:
            head.cancel()
            stop.cancel()


class _Telling:
    """Tells how far a job is: about once a second, one after the other, none after its end."""

    def __init__(self, send: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._sending: asyncio.Task[None] | None = None
        self._progress = Progress()
        self._due = time.monotonic() + _TELL_SECONDS
        self._over = False

    def __call__(self, step: int, of: int) -> None:
        self._progress.told(step, of)
        now = time.monotonic()
        busy = self._sending is not None and not self._sending.done()
        if self._over or busy or now < self._due:
            return
        self._due = now + _TELL_SECONDS
        self._sending = asyncio.create_task(self._send(self._progress.view()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._over = True
        if self._sending is None:
            return
        if failure:
            self._sending.cancel()
        await asyncio.wait({self._sending})


def _encode(result: Mapping[str, Any]) -> bytes:
    return "".join(large_json.parts(result)).encode()


def _post(job: Mapping[str, Any], body: bytes) -> dict[str, Any]:
    """A request as the SDK makes it, but for the id, which it puts where all jobs share it."""
    return {
        "url": rp_http.JOB_DONE_URL.replace("$ID", job["id"]) + "&isStream=false",
        "data": body,
        "headers": {
            "charset": "utf-8",
            "Content-Type": "application/x-www-form-urlencoded",
            "X-Request-ID": job["id"],
        },
    }


def _ping(*arguments: Any) -> None:
    """The SDK's ping process. It ends with the worker, even with one that is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _SDK_PING(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(0)
