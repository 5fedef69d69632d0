"""What goes wrong between a worker and its queue: the real SDK in a process of its own.

Most tests run `handler.py` on the miniature; where the worker's own behaviour must be odd, a stub
takes its place.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from image_worker.bench.load import worker_process
from image_worker.bench.stand_in_queue import Seen, StandInQueue
from tests.worker_jobs import job

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
HANDLER = (sys.executable, str(ROOT / "handler.py"))
STUB = (sys.executable, "-m", "tests.serve.stub_worker")


@dataclass
class Served:
    """A worker, and the queue that it serves."""

    queue: StandInQueue
    process: subprocess.Popen[bytes]
    log: Path

    def pinged_without_jobs(self) -> None:
        """Waits until the worker reports that it has no job any more."""
        since = time.monotonic()
        self.queue.wait(
            lambda: any(s.moment > since and not s.body for s in self.queue.of("ping")),
            10,
            "jobs are reported that are over",
        )


@contextmanager
def served(log: Path, command: tuple[str, ...], **variables: str) -> Iterator[Served]:
    with (
        StandInQueue() as queue,
        worker_process(queue.environment() | variables, log, command) as process,
    ):
        queue.wait(lambda: bool(queue.of("poll")), 90, "the worker did not come up")
        yield Served(queue, process, log)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: Any) -> Iterator[Served]:
    """One process for all tests that leave it well."""
    log = tmp_path_factory.mktemp("mini") / "log"
    with served(log, HANDLER, MODEL="mini") as found:
        yield found


@pytest.fixture(scope="module")
def stub(tmp_path_factory: Any) -> Iterator[Served]:
    """The same, of the stub."""
    log = tmp_path_factory.mktemp("stub") / "log"
    with served(log, STUB) as found:
        yield found


@pytest.fixture
def own_stub(tmp_path: Path) -> Iterator[Served]:
    """For a test that ends it."""
    with served(tmp_path / "log", STUB) as found:
        yield found


def named(name: str, **options: Any) -> dict[str, Any]:
    return job(**options) | {"id": name}


def long(name: str, steps: int = 100) -> dict[str, Any]:
    """A job that fills the batch for seconds."""
    return named(name, num_inference_steps=steps, num_images=4)


def stubbed(name: str, **given: Any) -> dict[str, Any]:
    return {"id": name, "input": given}


def test_a_result_that_is_not_taken_is_posted_again(mini: Served) -> None:
    mini.queue.faults.posts["again"] = deque([429, 0])  # too busy; then the connection is cut
    mini.queue.put(named("again", seed=5))
    assert mini.queue.answer("again")["output"]["seed"] == 5
    assert len(mini.queue.of("refused", "again")) == 2
    assert len(mini.queue.of("posted", "again")) == 1


def test_a_queue_in_trouble_is_asked_again_but_not_at_once(mini: Served) -> None:
    polls, start = len(mini.queue.of("poll")), time.monotonic()
    mini.queue.faults.takes.extend([500, "no json", '[{"no": "id"}, "no job"]', 429])
    mini.queue.put(named("before"))  # ends the poll that is open
    mini.queue.wait(lambda: not mini.queue.faults.takes, 30, "the queue is not asked any more")
    mini.queue.put(named("after"))
    assert mini.queue.answer("before")["output"] and mini.queue.answer("after")["output"]
    seconds = time.monotonic() - start
    assert len(mini.queue.of("poll")) - polls <= seconds + 2
    assert mini.process.poll() is None


def test_cancelled_jobs_leave_and_others_go_on(mini: Served) -> None:
    mini.queue.put(long("denoising"))
    mini.queue.wait(lambda: bool(mini.queue.of("progress", "denoising")), 60, "it does not run")
    mini.queue.put(long("waiting"), named("other"))
    mini.queue.wait(lambda: bool(mini.queue.of("handed", "other")), 10, "it is not taken")
    mini.queue.stop("waiting")
    mini.queue.stop("denoising")
    mini.queue.wait(lambda: bool(mini.queue.of("stop", "denoising")), 10, "no one asks for stops")
    start = time.monotonic()
    assert mini.queue.answer("other")["output"]
    assert time.monotonic() - start < 5
    mini.pinged_without_jobs()
    for name in ("denoising", "waiting"):
        assert not mini.queue.of("posted", name)


def test_progress_is_told_in_order_and_not_after_the_end(mini: Served) -> None:
    mini.queue.put(long("long", steps=60))
    mini.queue.answer("long")
    mini.pinged_without_jobs()
    told = mini.queue.of("progress", "long")
    steps = [update.body["output"]["step"] for update in told]
    assert steps and steps == sorted(set(steps)) and steps[-1] <= 60
    for update in told:
        assert update.body["output"]["seconds_left"] >= 0
        assert update.body["output"]["of"] == 60
    moments = [update.moment for update in told]
    assert all(later - earlier > 0.8 for earlier, later in pairwise(moments))
    assert moments[-1] < mini.queue.of("posted", "long")[0].moment


def test_sigterm_drains_and_drops_nothing(mini: Served) -> None:
    """The signal comes with jobs in flight, and with a poll's answer on its way.

    The last of those that share a process, since it ends it.
    """
    queue, before = mini.queue, len(mini.queue.of("handed"))
    queue.put(*(named(f"running-{n}", num_inference_steps=50) for n in range(3)))
    queue.wait(lambda: len(queue.of("handed")) == before + 3, 30, "the jobs were not taken")
    queue.faults.lag, queue.faults.drip = 0.2, 0.5
    queue.put(named("half-way"))
    queue.wait(lambda: bool(queue.of("handed", "half-way")), 10, "no poll was open")
    mini.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    queue.put(named("too late"))
    assert mini.process.wait(30) == 0
    end = time.monotonic()
    handed = [seen.job for seen in queue.of("handed")[before:]]
    assert sorted(handed) == ["half-way", "running-0", "running-1", "running-2"]
    assert all(len(queue.of("posted", name)) == 1 for name in handed)
    assert end - queue.of("posted")[-1].moment < 5


def test_sigterm_ends_an_idle_worker_at_once(own_stub: Served) -> None:
    own_stub.process.send_signal(signal.SIGTERM)
    assert own_stub.process.wait(3) == 0


def test_a_job_that_is_cancelled_as_soon_as_it_is_taken_does_not_run(stub: Served) -> None:
    stub.queue.put(stubbed("young", seconds=1))
    stub.queue.wait(lambda: bool(stub.queue.of("handed", "young")), 10, "it is not taken")
    stub.queue.stop("young")
    time.sleep(1.5)
    stub.pinged_without_jobs()
    assert not stub.queue.of("posted", "young")


def test_sigkill_ends_the_pings(own_stub: Served) -> None:
    own_stub.queue.put(stubbed("lost", seconds=60))
    own_stub.queue.wait(
        lambda: "lost" in [s.body for s in own_stub.queue.of("ping")], 10, "no pings"
    )
    own_stub.process.kill()
    own_stub.process.wait()
    time.sleep(0.5)
    pings = len(own_stub.queue.of("ping"))
    time.sleep(2.5)
    assert len(own_stub.queue.of("ping")) == pings


def test_a_result_that_is_never_taken_is_said_to_be_lost_and_holds_nobody_up(stub: Served) -> None:
    stub.queue.faults.always["doomed"] = 500
    stub.queue.put(stubbed("doomed"), *(stubbed(f"other-{number}") for number in range(12)))
    for number in range(12):
        assert stub.queue.answer(f"other-{number}") == {"output": {"seed": 1}}
    stub.pinged_without_jobs()
    assert len(stub.queue.of("refused", "doomed")) == 3
    assert "job doomed: the queue did not take its result" in stub.log.read_text()


def test_a_reply_that_is_no_json_is_an_error_and_not_a_lost_job(stub: Served) -> None:
    for name in ("bytes", "nan"):
        stub.queue.put(stubbed(name, answer=name))
        posted = stub.queue.answer(name)
        assert set(posted) == {"error"}
        assert json.loads(posted["error"])["type"] == "internal_error"


def test_half_a_character_in_a_reply_does_no_harm(stub: Served) -> None:
    stub.queue.put(stubbed("half", answer="surrogate"))
    assert stub.queue.answer("half") == {"output": {"prompt": "\ud800"}}


def test_a_broken_worker_answers_what_it_has_and_ends(own_stub: Served) -> None:
    own_stub.queue.put(
        stubbed("in flight", seconds=2), stubbed("breaks", seconds=1, answer="break")
    )
    assert own_stub.process.wait(10) == 1
    broken = own_stub.queue.answer("breaks")
    assert json.loads(broken["error"])["retryable"]
    assert broken["stopPod"]
    assert own_stub.queue.answer("in flight")["output"] == {"seed": 1}
    last_poll: Seen = own_stub.queue.of("poll")[-1]
    assert last_poll.moment < own_stub.queue.of("posted", "breaks")[0].moment
