"""One job from the command line: pictures go to a folder, the reply without them to the screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pybase64
from tqdm import tqdm

from image_worker.worker import Worker

OUTPUT_FOLDER = Path("generated-images")


def run_one(worker: Worker, job: Mapping[str, Any], folder: Path = OUTPUT_FOLDER) -> int:
    """Runs `job`, writes its pictures, prints the rest. Returns the process's exit status."""
    reply = answer(worker, job)
    if "error" in reply:
        _print(json.dumps(reply, indent=2, ensure_ascii=False), sys.stderr)
        return 1
    try:
        paths = save_pictures(reply, folder) if "images" in reply else []
    except OSError as error:
        _print(f"error: the pictures cannot be written to {folder}: {error.strerror}", sys.stderr)
        return 1
    shown = {name: value for name, value in reply.items() if name not in _PICTURES}
    _print(json.dumps(shown, indent=2, ensure_ascii=False))
    for path in paths:
        _print(f"wrote {path}")
    return 0


def answer(worker: Worker, job: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to `job`. In a terminal, a bar shows its steps."""
    with tqdm(desc="denoising", unit="step", disable=None) as bar:

        def progress(step: int, of: int) -> None:
            bar.total = of
            bar.update(step - bar.n)

        return worker.run_blocking(job, progress)


_PICTURES = ("output_image_base64", "images")


def save_pictures(reply: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a reply's pictures under names that tell when and with which seed they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    moment = time.strftime("%Y%m%d-%H%M%S")
    paths = []
    for seed, picture in zip(reply["seeds"], reply["images"], strict=True):
        path = folder / f"{moment}-seed{seed}.{reply['output_format']}"
        path.write_bytes(pybase64.b64decode(picture))
        paths.append(path)
    return paths


def _print(text: str, stream: Any = None) -> None:
    """The command's output; everything else goes through the log."""
    (stream or sys.stdout).write(text + "\n")
