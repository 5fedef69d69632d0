"""A whole job, from JSON to a PNG in base64: `python -m image_worker.bench.whole_job FOLDER`.

The worker and diffusers' pipeline with NF4 weights take turns in one process, at full size with
random weights (FOLDER gets a checkpoint of 57 GB, once): 1024², one reference, 4 steps, without
guidance. The stock pipeline is spared the LoRA, which costs it more.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from image_worker.bench.full_size import MODEL, ensure_checkpoint, job
from image_worker.bench.stock import edit_plus_pipeline
from image_worker.catalog import CATALOG
from image_worker.model import files
from image_worker.model.hardware import GIB
from image_worker.settings import Settings
from image_worker.worker import Worker

STEPS = 4
ROUNDS = 5


def main() -> None:
    """Writes the checkpoint if need be; measures; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument(
        "--precisions", nargs="+", default=["4bit"], choices=("bf16", "fp8", "svdq", "4bit")
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    ensure_checkpoint(options.folder)
    results = measure(options.folder, options.precisions, options.rounds)
    sys.stdout.write(table(results))
    if options.json:
        options.json.write_text(json.dumps(results))


def measure(folder: Path, precisions: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds to start, seconds of each stage (medians), GiB of the card: ours, then stock.

    "new schedule s": what the first job with another number of steps takes more than the next.
    """
    settings = {precision: _settings(folder, precision) for precision in precisions}
    checkpoint = files.find_model(CATALOG[MODEL], settings[precisions[0]])
    made: list[tuple[dict[str, Any], Any]] = []
    for precision in precisions:
        before, clock = torch.cuda.memory_allocated(), time.perf_counter()
        worker = Worker.from_settings(settings[precision])
        made.append((_facts(f"ours, {precision}", before, clock), worker.run_blocking))
    before, clock = torch.cuda.memory_allocated(), time.perf_counter()
    pipeline = edit_plus_pipeline(checkpoint, torch.bfloat16, nf4=True)
    pipeline.vae.to("cuda")
    made.append((_facts("stock, NF4", before, clock), lambda given: stock(pipeline, given)))

    for facts, run in made:
        facts["first job s"] = _timings(run, 0)["total"]
        # Of other timesteps, which ours knows no modulation of yet; then once more.
        other = [_timings(run, 0, num_inference_steps=STEPS - 1)["total"] for _ in range(3)]
        facts["new schedule s"] = other[0] - min(other[1:])
        sys.stderr.write(f"{json.dumps(facts)}\n")
    taken: list[list[dict[str, float]]] = [[] for _ in made]
    for seed in range(1, rounds + 1):
        for (_, run), found in zip(made, taken, strict=True):
            found.append(_timings(run, seed))
    for (facts, _), found in zip(made, taken, strict=True):
        facts |= {stage: statistics.median(one[stage] for one in found) for stage in found[0]}
        low, _, high = statistics.quantiles([one["total"] for one in found], n=4)
        facts["± total"] = (high - low) / 2
    return [facts for facts, _ in made]


def _settings(folder: Path, precision: str) -> Settings:
    return Settings.from_env(
        {
            "MODEL": MODEL,
            "MODEL_DIR": str(folder),
            "LOCAL_ONLY": "1",
            "LIGHTNING_STEPS": str(STEPS),
            "PRECISION_MODE": precision,
            "REMEMBER_MB": "0",  # its jobs are all of one picture; people's are not
        }
    )


def stock(pipeline: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A job by diffusers' pipeline, as a worker around it does it."""
    clock = time.perf_counter()
    stages = {}

    def passed(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        stages[stage], clock = now - clock, now

    image = Image.open(io.BytesIO(base64.b64decode(given["input"]["image_base64"]))).convert("RGB")
    passed("fetch")
    result = pipeline(
        image=[image],
        prompt=given["input"]["prompt"],
        num_inference_steps=given["input"].get("num_inference_steps", STEPS),
        true_cfg_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(given["input"]["seed"]),
    ).images[0]
    passed("pipeline")
    buffer = io.BytesIO()
    result.save(buffer, "PNG")
    reply = {"image_base64": base64.b64encode(buffer.getvalue()).decode()}
    passed("file")
    return reply | {"timings": stages | {"total": sum(stages.values())}}


def _timings(run: Any, seed: int, **options: Any) -> dict[str, float]:
    """Of one job; its total as the caller sees it."""
    given = {"id": str(seed), "input": job(seed) | options}
    torch.cuda.synchronize()
    start = time.perf_counter()
    reply = run(given)
    total = time.perf_counter() - start
    if "error" in reply:
        raise SystemExit(json.dumps(reply))
    timings: dict[str, float] = reply["timings"]
    return timings | {"total": total}


def _facts(name: str, before: int, clock: float) -> dict[str, Any]:
    return {
        "what": name,
        "start s": time.perf_counter() - clock,
        "weights GiB": (torch.cuda.memory_allocated() - before) / GIB,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    titles = list(dict.fromkeys(title for result in results for title in result))
    lines = [titles, ["---"] * len(titles)]
    for result in results:
        cells = (result.get(title, "") for title in titles)
        lines.append([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
