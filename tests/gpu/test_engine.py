"""Jobs that are begun beside another's steps, on a side stream. Run by `make test-gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.pictures import psnr
from tests.worker_jobs import job, picture

pytestmark = pytest.mark.gpu

SEEDS = range(24)


def test_a_job_that_is_begun_ahead_is_the_same_as_alone() -> None:
    worker = Worker.from_settings(Settings.from_env({"MODEL": "mini", "BATCH_SIZE": "2"}))
    assert worker.engine._aside is not None
    alone = [worker.run_blocking(job(seed=seed, num_inference_steps=8)) for seed in SEEDS]
    with ThreadPoolExecutor(12) as pool:
        crowded = list(
            pool.map(lambda seed: worker.run_blocking(job(seed=seed, num_inference_steps=8)), SEEDS)
        )
    worker.close()
    for one, other in zip(alone, crowded, strict=True):
        assert psnr(picture(one), picture(other)) >= 40
