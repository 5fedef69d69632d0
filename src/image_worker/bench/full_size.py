"""Cold start, memory and speed at full size: `python -m image_worker.bench.full_size FOLDER`.

Writes a random-weight checkpoint into FOLDER (57 GB, once), then serves 1024² jobs with one
reference from a fresh process per configuration, and prints a table. Needs a CUDA card; what does
not fit on it is reported, not skipped.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_worker.catalog import CATALOG

MODEL = "edit-2509"
CONFIGURATIONS: tuple[dict[str, str], ...] = (
    {"PRECISION_MODE": "4bit"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "24"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "12"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "10"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "8"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "6"},
    {"PRECISION_MODE": "4bit", "GPU_MAX_GIB": "4"},
    {"PRECISION_MODE": "fp8"},
    {"PRECISION_MODE": "fp8", "GPU_MAX_GIB": "16"},
    {"PRECISION_MODE": "bf16"},
    {"PRECISION_MODE": "bf16", "GPU_MAX_GIB": "24"},
    {"PRECISION_MODE": "8bit", "GPU_MAX_GIB": "24"},
)
_COLUMNS = (
    ("precision", "PRECISION_MODE"),
    ("limit, GiB", "GPU_MAX_GIB"),
    ("blocks that pass", "passing"),
    ("start, s", "cold_start"),
    ("forecast, GiB", "forecast"),
    ("peak, GiB", "peak_vram"),
    ("of it in use", "peak_allocated"),
    ("host, GiB", "peak_host"),
    ("first job, s", "first_job"),
    ("a job, s", "job"),
    ("encode", "encode"),
    ("denoise", "denoise"),
    ("decode", "decode"),
    ("512², a job of 1, s", "small_1"),
    ("of 4", "small_4"),
)


def main() -> None:
    """Writes the checkpoint if need be, runs every configuration, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is kept")
    parser.add_argument("--log", type=Path, help="also append each result, as JSON, to this file")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of configurations, from 0")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure()
        return
    ensure_checkpoint(options.folder)
    chosen = options.only if options.only is not None else range(len(CONFIGURATIONS))
    results = []
    for number in chosen:
        result = run(options.folder, CONFIGURATIONS[number])
        results.append(result)
        line = json.dumps(result)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if options.log:
            with options.log.open("a") as log:
                log.write(line + "\n")
    sys.stdout.write(table(results))


def ensure_checkpoint(folder: Path) -> None:
    """Writes the checkpoint, if it is not there."""
    done = folder / "complete"
    if done.exists():
        return
    from image_worker.bench.checkpoint import write_checkpoint

    start = time.perf_counter()
    write_checkpoint(folder, CATALOG[MODEL])
    done.touch()
    sys.stdout.write(f"checkpoint written in {time.perf_counter() - start:.0f} s\n")


def run(folder: Path, configuration: dict[str, str]) -> dict[str, Any]:
    """One configuration in a process of its own: its measurements, or its error."""
    from image_worker.settings import environment

    variables = {
        "MODEL": MODEL,
        "MODEL_DIR": str(folder),
        "LOCAL_ONLY": "1",
        "HF_HUB_OFFLINE": "1",
        "REMEMBER_MB": "0",  # its jobs are all of one picture; people's are not
        "LIGHTNING_STEPS": "4",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # as handler.py has it
        **configuration,
    }
    command = [sys.executable, "-m", "image_worker.bench.full_size", str(folder), "--child"]
    done = subprocess.run(
        command,
        env=environment(variables),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode:
        return configuration | {"error": f"exit status {done.returncode}"}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return configuration | measured


def measure() -> None:
    """In the child: cold start, a first job, two more; prints one line of JSON."""
    import torch

    from image_worker.model.cold_start import host_peak_gib
    from image_worker.model.hardware import GIB
    from image_worker.settings import Settings
    from image_worker.worker import Worker

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    start = time.perf_counter()
    worker = Worker.from_settings(Settings.from_env())
    cold_start = time.perf_counter() - start
    plan = worker.model.plan
    load_vram = torch.cuda.max_memory_reserved() / GIB
    torch.cuda.reset_peak_memory_stats()
    first, _, last = (timings(worker, seed) for seed in range(3))
    found = {
        "plan": plan.describe(),
        "passing": len(plan.streamed),
        "forecast": (plan.peak or 0) / GIB,
        "steps": {step.name: step.seconds for step in worker.model.cold_start.steps},
        "cold_start": cold_start,
        "load_vram": load_vram,
        "weights_vram": torch.cuda.memory_allocated() / GIB,
        "peak_vram": torch.cuda.max_memory_reserved() / GIB,
        "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
        "peak_host": host_peak_gib(),
        "first_job": first["total"],
        "job": last["total"],
        "encode": last["encode"],
        "denoise": last["denoise"],
        "decode": last["decode"],
        "small_1": small(worker, 1),
        "small_4": small(worker, 4),
        **working_memory(worker),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def timings(worker: Any, seed: int) -> dict[str, float]:
    """Seconds of a job's stages; ends this process if there is an error."""
    reply = worker.run_blocking({"id": str(seed), "input": job(seed)})
    if "error" in reply:
        raise SystemExit(json.dumps(reply))
    found: dict[str, float] = reply["timings"]
    return found


def small(worker: Any, pictures: int) -> float:
    """Seconds to denoise so many pictures of 512² without references, together."""
    import torch

    from image_worker.edit import conditions
    from image_worker.edit.denoise import denoise, start

    model = worker.model
    found = conditions.encode(model, "a red circle", None, [])
    taken = []
    for seed in range(2):
        batch = [
            start(model, found, (512, 512), seed=seed, steps=4, cfg_scale=1.0)
            for _ in range(pictures)
        ]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        denoise(model, batch)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return taken[-1]


def working_memory(worker: Any) -> dict[str, float]:
    """Peak bytes above the weights: per token and width while denoising, per pixel while decoding.

    These are the constants of `model/placement.py`.
    """
    import torch

    from image_worker.edit import conditions
    from image_worker.edit.decode import decode
    from image_worker.edit.denoise import denoise, start
    from image_worker.job.images import load_images
    from image_worker.job.request import EditRequest

    model = worker.model
    request = EditRequest.parse(job(0), model.entry)
    images = load_images(request.sources, lambda image: image)
    encoded = conditions.encode(model, request.prompt, None, images)
    picture = start(model, encoded, (1024, 1024), seed=0, steps=2, cfg_scale=1.0)
    tokens = len(picture.latents) + len(encoded.references) + len(encoded.text)
    peaks = []
    for work in (lambda: denoise(model, [picture]), lambda: decode(model, picture)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    width = model.transformer.width
    return {
        "tokens": tokens,
        "denoise_bytes": round(peaks[0] / tokens / width, 2),
        "decode_bytes": round(peaks[1] / 1024**2 / model.vae.config.base_dim, 2),
    }


def job(seed: int) -> dict[str, Any]:
    """An edit of a 1024² picture."""
    return {"prompt": "make the red circle blue", "image_base64": picture(1024), "seed": seed}


def picture(side: int) -> str:
    """Noise, `side` pixels each way, as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((side, side), 64).convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| " + " | ".join(title for title, _ in _COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
    ]
    for result in results:
        cells = [_cell(result.get(key, result.get("error", ""))) for _, key in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
