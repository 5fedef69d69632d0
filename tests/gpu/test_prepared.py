"""Prepared weights on a card: the picture is the first start's. Run by `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from image_worker.model.packed import slots
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.worker_jobs import job

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("offload", ["none", "stream"])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "8bit", "4bit"])
def test_the_second_start_makes_the_same_picture(
    precision: str, offload: str, tmp_path: Path, caplog: Any
) -> None:
    environment = {
        "MODEL": "mini",
        "MODEL_DIR": str(tmp_path),
        "PRECISION_MODE": precision,
        "CPU_OFFLOAD": offload,
        "EMBED_METADATA": "0",
    }
    pictures = []
    for _ in range(2):
        worker = Worker.from_settings(Settings.from_env(environment))
        pictures.append(worker.run_blocking(job(seed=3))["images"])
        worker.close()
    assert pictures[0] == pictures[1]
    assert "damaged" not in caplog.text and "could not" not in caplog.text
    assert "prepare" not in [step.name for step in worker.model.cold_start.steps]
    devices = {slot.tensor.device.type for slot in slots(worker.model.transformer.blocks[0])}
    assert devices == {"cuda"}
    assert bool(worker.model.transformer.blocks.away) == (offload == "stream")
    torch.cuda.empty_cache()
