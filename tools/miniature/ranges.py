"""Makes the miniature's activation ranges: `python -m tools.miniature.ranges`.

From edits as it was trained on, four of each kind, by Lightning 8, so that figures on held-out
edits stay honest. Runs on a CPU in about a minute; to be run again after `package.py`.
"""

from __future__ import annotations

from random import Random

import torch

from image_worker.model import ranges
from image_worker.model.build import build
from image_worker.model.hardware import Hardware
from image_worker.settings import Settings
from tools.miniature import quality
from tools.miniature.edits import KINDS, random_edit

PER_KIND = 4
SAMPLING = next(sampling for sampling in quality.SAMPLINGS if sampling.name == "Lightning 8")


def main() -> None:
    """Edits, and writes what was recorded to where the catalogue looks for it."""
    path = quality.MINI.ranges
    assert path is not None
    settings = Settings.from_env({"PRECISION_MODE": "bf16", "ATTENTION": "bf16"})
    model = build(settings, quality.MINI, Hardware("CPU"), dtype=torch.float32)
    edits = [
        random_edit(Random(f"ranges {kind} {number}"), kind, "train")
        for kind in KINDS
        for number in range(PER_KIND)
    ]
    encoded = quality.encode(model, quality.drawn(edits))
    with ranges.watch_served(model.transformer) as recorder:
        quality.edit(model, encoded, SAMPLING)
    unseen = ranges.write(path, recorder, model.transformer.config)
    print(
        f"{path}: {len(edits)} edits, {recorder.forwards} forwards; {unseen} layers read nothing;"
        f" {path.stat().st_size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
