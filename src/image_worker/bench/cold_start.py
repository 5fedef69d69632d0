"""From a process' start to its first picture: `python -m image_worker.bench.cold_start FOLDER`.

The worker, from weights that an earlier start prepared, and a worker around diffusers' pipeline
that loads and quantises the same checkpoint to NF4, in turns, each in a process of its own: 1024²,
one reference, 4 steps, random weights of the true size (FOLDER gets 57 GB, once, and 13 prepared).
Also how long the prepared files take to be read, and nothing else. With `--evict` it is all done
once more with these dropped from the page cache before, where the file system allows that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from image_worker.bench.full_size import MODEL, ensure_checkpoint, job

_CHUNK, _THREADS = 2**25, 8
Run = Callable[[dict[str, Any]], dict[str, Any]]  # a job to its reply
_COLUMNS = ("imports", "model", "first picture", "second picture", "peak host GiB", "above imports")


def main() -> None:
    """Writes the checkpoint if need be; measures; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evict", action="store_true", help="also from the disk")
    parser.add_argument("--child", choices=("ours", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child, options.begun)) + "\n")
        return
    ensure_checkpoint(options.folder)
    results = {"ours, preparing": [start("ours", options.folder)]}
    raw: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for state in ("from the disk", "from memory") if options.evict else ("from memory",):
            for work in ("ours", "read"):
                if state == "from the disk":
                    evict(options.folder)
                if work == "ours":
                    results.setdefault(f"ours, {state}", []).append(start("ours", options.folder))
                else:
                    raw.setdefault(state, []).append(read(options.folder))
        results.setdefault("stock", []).append(start("stock", options.folder))
    sys.stdout.write(f"| seconds | {' | '.join(_COLUMNS)} |\n{'| --- ' * (1 + len(_COLUMNS))}|\n")
    for name, found in results.items():
        cells = (f"{statistics.median(one[column] for one in found):.2f}" for column in _COLUMNS)
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    size = sum(file.stat().st_size for file in files(options.folder)) / 1e9
    for state, seconds in raw.items():
        taken = statistics.median(seconds)
        sys.stdout.write(f"reading the prepared {size:.1f} GB {state}: {taken:.2f} s\n")


def start(name: str, folder: Path) -> dict[str, float]:
    """One process, from its start on."""
    from image_worker.settings import environment

    variables = environment(
        {
            "MODEL": MODEL,
            "MODEL_DIR": str(folder),
            "LOCAL_ONLY": "1",
            "HF_HUB_OFFLINE": "1",
            "PRECISION_MODE": "4bit",
            "LIGHTNING_STEPS": "4",
            "KEEP_PREPARED": "1",
        }
    )
    command = [sys.executable, "-m", "image_worker.bench.cold_start", str(folder), "--child", name]
    command += ["--begun", str(time.time())]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{name}: {found}\n")
    return found


def measure(name: str, begun: float) -> dict[str, float]:
    """In the child: seconds from the process' start, by its parent's clock; GiB of host memory."""
    load = _ours if name == "ours" else _stock
    make = load()
    from image_worker.model.cold_start import host_peak_gib

    imported, before = time.time(), host_peak_gib()
    run = make()
    moments = [imported, time.time()]
    for seed in range(2):
        reply = run({"id": str(seed), "input": job(seed)})
        if "error" in reply:
            raise SystemExit(json.dumps(reply))
        moments.append(time.time())
    numbers = [moment - begun for moment in moments] + [host_peak_gib(), host_peak_gib() - before]
    return dict(zip(_COLUMNS, numbers, strict=True))


def _ours() -> Callable[[], Run]:
    """Imports; then makes the worker. As `handler.py` does it."""
    from image_worker.serve.process import prepare_process
    from image_worker.settings import Settings

    prepare_process()
    from image_worker.worker import Worker

    return lambda: Worker.from_settings(Settings.from_env()).run_blocking


def _stock() -> Callable[[], Run]:
    """Imports; then makes the pipeline."""
    import torch

    from image_worker.bench.stock import edit_plus_pipeline
    from image_worker.bench.whole_job import stock
    from image_worker.catalog import CATALOG
    from image_worker.model.files import find_model
    from image_worker.settings import Settings

    def make() -> Run:
        checkpoint = find_model(CATALOG[MODEL], Settings.from_env())
        pipeline = edit_plus_pipeline(checkpoint, torch.bfloat16, nf4=True)
        pipeline.vae.to("cuda")
        return lambda given: stock(pipeline, given)

    return make


def files(folder: Path) -> list[Path]:
    """The prepared ones."""
    return sorted((folder / "prepared").resolve().rglob("*.safetensors"))


def evict(folder: Path) -> None:
    """Asks the kernel to drop the prepared files from its page cache."""
    for file in files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path) -> float:
    """Seconds to read all prepared files, by several threads, and to do nothing with them."""

    def piece(given: tuple[Path, int]) -> None:
        descriptor = os.open(given[0], os.O_RDONLY)
        os.pread(descriptor, _CHUNK, given[1])
        os.close(descriptor)

    pieces = [(file, at) for file in files(folder) for at in range(0, file.stat().st_size, _CHUNK)]
    clock = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(piece, pieces))
    return time.perf_counter() - clock


if __name__ == "__main__":
    main()
