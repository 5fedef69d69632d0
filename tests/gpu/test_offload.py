"""Quantised components that leave the card and come back. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from image_worker.model.formats import FORMATS
from image_worker.model.offload import Placement
from image_worker.model.packed import slots
from image_worker.settings import Precision, Settings
from image_worker.worker import Worker
from tests.pictures import psnr
from tests.worker_jobs import job, picture

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_a_layer_is_the_same_after_each_return(precision: Precision) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    found = FORMATS[precision]
    assert found is not None
    layer = found.encode(weight, True, torch.bfloat16)
    layer.bias = nn.Parameter(torch.randn(512, device="cuda", dtype=torch.bfloat16))
    module = nn.Sequential(layer)
    x = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        before = module(x)
        placement = Placement(torch.device("cuda"), offload=True)
        placement.add("it", module)
        placement.add("other", nn.Linear(4, 4, device="cuda"))
        assert {slot.tensor.device.type for slot in slots(module)} == {"cpu"}
        for _ in range(2):
            placement.bring("it")
            assert torch.equal(module(x), before)
            placement.bring("other")


@pytest.mark.parametrize("precision", ["bf16", "4bit", "8bit"])
def test_offload_does_not_change_the_picture(precision: str) -> None:
    def edit(offload: str) -> Image.Image:
        settings = Settings.from_env(
            {
                "MODEL": "mini",
                "PRECISION_MODE": precision,
                "CPU_OFFLOAD": offload,
                "REMEMBER_MB": "0",
            }
        )
        worker = Worker.from_settings(settings)
        replies = [worker.run_blocking(job(seed=3)) for _ in range(2)]
        assert replies[0]["images"] == replies[1]["images"]
        return picture(replies[0])

    assert psnr(edit("model"), edit("none")) >= 60
