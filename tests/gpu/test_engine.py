"""Jobs that are begun beside another's steps, on a side stream. Run by `make test-gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from image_worker import engine as engine_module
from image_worker.edit import conditions
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.pictures import psnr
from tests.worker_jobs import job, picture

pytestmark = pytest.mark.gpu

SEEDS = range(24)


def test_a_job_that_is_begun_ahead_is_the_same_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MODEL": "mini", "BATCH_SIZE": "2", "REMEMBER_MB": "0"}
    worker = Worker.from_settings(Settings.from_env(variables))
    streams = []

    def encode_prompts(*given: Any) -> Any:
        streams.append(torch.cuda.current_stream())
        return conditions.encode_prompts(*given)

    monkeypatch.setattr(engine_module, "encode_prompts", encode_prompts)
    alone = [worker.run_blocking(job(seed=seed, num_inference_steps=8)) for seed in SEEDS]
    with ThreadPoolExecutor(12) as pool:
        crowded = list(
            pool.map(lambda seed: worker.run_blocking(job(seed=seed, num_inference_steps=8)), SEEDS)
        )
    worker.close()
    assert streams.count(worker.engine._aside) > len(SEEDS) / 2
    for one, other in zip(alone, crowded, strict=True):
        assert psnr(picture(one), picture(other)) >= 40
