"""Many mixed jobs at once: `python -m image_worker.bench.load --jobs 500`.

Starts a worker on this machine, behind a stand-in for RunPod's queue or as the standalone server.
Gives it jobs that differ in steps, pictures and seeds, some of them bad; checks that each is
answered once and rightly; prints a table. Without `--rate` a number of clients each wait for an
answer before they ask again; with it, jobs arrive at random moments whatever the worker does.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from image_worker.bench.stand_in_queue import StandInQueue
from image_worker.settings import environment

HANDLER = "import sys; from image_worker.serve.main import main; sys.exit(main())"
START_SECONDS = 900  # a cold start may download
_ANSWER_SECONDS = 600
_BAD_SHARE = 0.05
# What is wrong with a bad job, and the error that it must get.
_BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"seed": "seven"}, "invalid_request"),
    ({"sead": 7}, "invalid_request"),
    ({"prompt": ""}, "invalid_request"),
    ({"images": ["bm8gcGljdHVyZQ=="]}, "invalid_image"),
)

Reply = Mapping[str, Any]
Ask = Callable[[Mapping[str, Any]], Reply]


@dataclass(frozen=True)
class Case:
    """A job, and the type of the error that it must get, if it must get one."""

    job: Mapping[str, Any]
    error: str | None


@dataclass(frozen=True)
class Outcome:
    """What a job got, and how long after it was asked for."""

    case: Case
    reply: Reply
    seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with the reply."""
        asked, name = self.case.job["input"], self.case.job["id"]
        if "error" in self.reply:
            found = json.loads(self.reply["error"])["type"]
            return None if found == self.case.error else f"job {name}: {self.reply['error']}"
        if self.case.error:
            return f"job {name}: should have been {self.case.error}"
        output = self.reply["output"]
        for field in ("prompt", "seed", "num_inference_steps"):
            if output[field] != asked[field]:
                return f"job {name}: {field} {output[field]!r} instead of {asked[field]!r}"
        return None if len(output["images"]) == asked["num_images"] else f"job {name}: pictures"


def main() -> int:
    """Runs the load, prints what is wrong and the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--batch-size", type=int, help="BATCH_SIZE of the worker")
    parser.add_argument("--mode", choices=list(_MODES), default="queue")
    parser.add_argument("--clients", type=int, default=16, help="that wait for their answers")
    parser.add_argument("--rate", type=float, help="jobs per second, instead of --clients")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    parser.add_argument("--log", type=Path, help="where the worker's log goes")
    options = parser.parse_args()
    variables = {"MODEL": environment({}).get("MODEL", "mini")}
    if options.batch_size:
        variables["BATCH_SIZE"] = str(options.batch_size)
    log = options.log or Path(tempfile.mkdtemp()) / "worker.log"
    chance = random.Random(options.seed)
    cases = make_cases(options.jobs, options.side, chance)
    with _MODES[options.mode](variables, log) as ask:
        start = time.perf_counter()
        outcomes = run(ask, cases, options.clients, options.rate, chance)
        seconds = time.perf_counter() - start
    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    sys.stdout.write(table(outcomes, seconds))
    return 1 if faults else 0


def make_cases(count: int, side: int, chance: random.Random) -> list[Case]:
    """Jobs of 2 to 8 steps with one or two pictures and results, and some bad ones."""
    return [_case(f"load-{number}", side, chance) for number in range(count)]


def _case(name: str, side: int, chance: random.Random) -> Case:
    asked = {
        "prompt": chance.choice(("make the red circle blue", "turn the scene upside down", "blur")),
        "images": [_picture(side, chance) for _ in range(chance.choice((1, 1, 2)))],
        "num_inference_steps": chance.randint(2, 8),
        "num_images": chance.choice((1, 1, 1, 2)),
        "seed": chance.randrange(2**31),
        "width": side,
        "height": side,
        "output_format": "jpeg",
    }
    wrong, error = chance.choice(_BAD) if chance.random() < _BAD_SHARE else ({}, None)
    return Case({"id": name, "input": asked | wrong}, error)


def _picture(side: int, chance: random.Random) -> str:
    from PIL import Image

    cells = Image.frombytes("RGB", (4, 4), chance.randbytes(48))
    buffer = io.BytesIO()
    cells.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def run(
    ask: Ask, cases: Sequence[Case], clients: int, rate: float | None, chance: random.Random
) -> list[Outcome]:
    """Asks for every job: by so many clients, or `rate` times a second on average."""

    def timed(case: Case) -> Outcome:
        start = time.perf_counter()
        reply = ask(case.job)
        return Outcome(case, reply, time.perf_counter() - start)

    with ThreadPoolExecutor(len(cases) if rate else clients) as pool:
        coming = []
        for case in cases:
            coming.append(pool.submit(timed, case))
            if rate:
                time.sleep(chance.expovariate(rate))
        return [outcome.result() for outcome in coming]


def table(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The figures as a Markdown table."""
    latencies = sorted(outcome.seconds for outcome in outcomes)
    outputs = [outcome.reply["output"] for outcome in outcomes if "error" not in outcome.reply]
    batches = [output["batch_size"] for output in outputs if "batch_size" in output]
    row = {
        "jobs": str(len(outcomes)),
        "of them refused": str(len(outcomes) - len(outputs)),
        "jobs/s": f"{len(outcomes) / seconds:.2f}",
        "p50, s": f"{statistics.median(latencies):.2f}",
        "p95, s": f"{latencies[int(0.95 * (len(latencies) - 1))]:.2f}",
        "mean batch": f"{statistics.mean(batches):.2f}" if batches else "",
    }
    lines = (row.keys(), ["---"] * len(row), row.values())
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


@contextmanager
def worker_process(
    variables: Mapping[str, str],
    log: Path,
    command: Sequence[str] = (sys.executable, "-c", HANDLER),
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, killed at the end if it still runs."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment(variables), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _behind_the_queue(variables: Mapping[str, str], log: Path) -> Iterator[Ask]:
    """A worker that takes its jobs from the stand-in. At the end it must stop when it is told to.

    Raises:
        RuntimeError: a job was answered more than once, or the worker did not end well.
    """
    with (
        StandInQueue() as queue,
        worker_process({**variables, **queue.environment()}, log) as process,
    ):
        queue.wait(lambda: bool(queue.of("poll")), START_SECONDS, f"no worker came; see {log}")

        def ask(job: Mapping[str, Any]) -> Reply:
            queue.put(job)
            answer: Reply = queue.answer(job["id"], _ANSWER_SECONDS)
            return answer

        yield ask
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=30)
        answered = [seen.job for seen in queue.of("posted")]
        if status or len(answered) != len(set(answered)):
            raise RuntimeError(f"exit status {status}, {len(answered)} answers; see {log}")


@contextmanager
def _over_http(variables: Mapping[str, str], log: Path) -> Iterator[Ask]:
    """The standalone server, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    own = {"STANDALONE_MODE": "1", "API_PORT": str(port), "API_HOST": "127.0.0.1"}
    with worker_process({**variables, **own}, log) as process:
        while not _is_ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the worker ended at once; see {log}")
            time.sleep(0.2)

        def ask(job: Mapping[str, Any]) -> Reply:
            # Not /run and /status: looking again and again would load the CPU that computes here.
            given = {"input": job["input"]}
            answer = requests.post(f"{url}/runsync", json=given, timeout=_ANSWER_SECONDS).json()
            if "error" in answer:  # an object here, a text behind RunPod's queue
                return {"error": json.dumps(answer["error"])}
            return {"output": answer["output"]}

        yield ask


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


_MODES = {"queue": _behind_the_queue, "http": _over_http}


if __name__ == "__main__":
    sys.exit(main())
