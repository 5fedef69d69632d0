"""Throughput of batches at full size: `python -m image_worker.bench.throughput FOLDER`.

Serves edits with one reference from the random-weight checkpoint in FOLDER (57 GB, written once) to
clients that each send their next job when the last one is answered, in this process. Jobs are let
join however busy the card is (`batching.ENOUGH_TOKENS` is off), to see what that gives. The card's
busy fraction is what `nvidia-smi` samples (kernels running, in percent of the time).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from image_worker.bench.full_size import MODEL, ensure_checkpoint, picture
from image_worker.settings import Settings
from image_worker.worker import Worker

SIDES = (512, 1024)
BATCH_SIZES = (1, 2, 4, 8)
_CLIENTS = 2 * max(BATCH_SIZES)  # so that the next batch is ready when one ends
_COLUMNS = ("side", "batch size", "jobs/s", "p50 s", "p95 s", "mean batch", "GPU busy %")


def main() -> None:
    """Measures every size with every batch size; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument(
        "--precision", default="4bit", choices=("bf16", "fp8", "8bit", "svdq", "4bit")
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="of each measurement")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    ensure_checkpoint(options.folder)
    settings = Settings.from_env(
        {
            "MODEL": MODEL,
            "MODEL_DIR": str(options.folder),
            "LOCAL_ONLY": "1",
            "PRECISION_MODE": options.precision,
            "LIGHTNING_STEPS": "4",
            "REMEMBER_MB": "0",  # its jobs are all of one picture; people's are not
        }
    )
    worker = Worker.from_settings(settings)
    worker.engine.limits.enough = None
    sys.stdout.write(f"{worker.model.plan.describe()}\n| {' | '.join(_COLUMNS)} |\n")
    sys.stdout.write("| --- " * len(_COLUMNS) + "|\n")
    for side in options.sides:
        asyncio.run(_load(worker, side, clients=1, seconds=1))  # kernels are chosen, caches filled
        for size in BATCH_SIZES:
            worker.engine.limits.pictures = size
            row = measure(worker, side, size, options.seconds)
            sys.stdout.write("| " + " | ".join(str(value) for value in row) + " |\n")
            sys.stdout.flush()
    worker.close()


def measure(worker: Worker, side: int, size: int, seconds: float) -> tuple[object, ...]:
    """One row of the table."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with subprocess.Popen([*command, "-lms", "100"], stdout=subprocess.PIPE, text=True) as smi:
        clock = time.perf_counter()
        replies, latencies = asyncio.run(_load(worker, side, _CLIENTS, seconds))
        elapsed = time.perf_counter() - clock
        smi.terminate()
        busy = [float(line) for line in (smi.stdout or ()) if line.strip().isdigit()]
    latencies.sort()
    return (
        side,
        size,
        f"{len(replies) / elapsed:.3f}",
        f"{statistics.median(latencies):.2f}",
        f"{latencies[int(0.95 * (len(latencies) - 1))]:.2f}",
        f"{statistics.fmean(reply['batch_size'] for reply in replies):.2f}",
        f"{statistics.fmean(busy):.1f}" if busy else "?",
    )


async def _load(
    worker: Worker, side: int, clients: int, seconds: float
) -> tuple[list[dict[str, Any]], list[float]]:
    """Closed loop for about so many seconds: replies, and seconds from request to reply."""
    shown = picture(side)
    end = time.perf_counter() + seconds
    replies: list[dict[str, Any]] = []
    latencies: list[float] = []

    async def client(number: int) -> None:
        seed = 1000 * number
        while not replies or time.perf_counter() < end:
            given = {"prompt": "make it blue", "image": shown, "width": side, "height": side}
            start = time.perf_counter()
            reply = await worker.run({"id": str(seed), "input": {**given, "seed": seed}})
            if "error" in reply:
                raise SystemExit(json.dumps(reply))
            replies.append(reply)
            latencies.append(time.perf_counter() - start)
            seed += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return replies, latencies


if __name__ == "__main__":
    main()
