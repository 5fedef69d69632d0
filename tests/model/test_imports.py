"""What a start imports, which is most of the time that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.model.cached_model import COMMIT, REPO, drop_weights, put_all

TEXT = """
import sys
from pathlib import Path
import torch
from PIL import Image
from image_worker.catalog import CATALOG
from image_worker.edit import patches
from image_worker.model import in_folder
from image_worker.model.components import TEXT_ENCODER
from image_worker.model.recipe import Recipe, read_component
from image_worker.model.text_config import read_patching
from image_worker.model.tokenizer import TextTokenizer
from image_worker.settings import Settings

entry, settings, folder = CATALOG["mini"], Settings.from_env({}), Path(CATALOG["mini"].repo)
recipe = Recipe(settings, entry, folder, (), torch.device("cpu"), torch.bfloat16)
encoder = read_component(recipe, TEXT_ENCODER, "bf16")
patching = read_patching(in_folder.read_json(folder / "processor" / "preprocessor_config.json"))
seen, grid = patches.cut(Image.new("RGB", (128, 128)), patching)
ids = TextTokenizer(folder / "tokenizer").ids("blur it" + "<|image_pad|>" * 16)
with torch.inference_mode():
    encoder(torch.tensor(ids), seen, [grid])
slow = ("transformers", "diffusers", "accelerate", "sympy")
sys.exit(" ".join(name for name in slow if name in sys.modules) or None)
"""

WHOLE = """
import sys
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.worker_jobs import job

worker = Worker.from_settings(Settings.from_env())
assert "prepare" not in [step.name for step in worker.model.cold_start.steps]
assert "images" in worker.run_blocking(job())
worker.close()
slow = ("transformers", "diffusers", "accelerate", "peft", "bitsandbytes", "sympy", "torch._dynamo")
others = (*slow, "image_worker.commands")
sys.exit(" ".join(name for name in others if name in sys.modules) or None)
"""


def run(program: str, **variables: str) -> None:
    environment = os.environ | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_prompts_and_pictures_are_encoded_without_slow_imports() -> None:
    run(TEXT)


@pytest.mark.parametrize("precision", ["4bit", "fp8"])
def test_a_start_from_prepared_weights_and_a_job_need_no_slow_imports(
    precision: str, tmp_path: Path
) -> None:
    """As on a Hopper card, as far as a CPU can."""
    variables = {
        "MODEL": "mini",
        "MODEL_DIR": str(tmp_path),
        "KEEP_PREPARED": "1",
        "PRECISION_MODE": precision,
        "COMPUTE": "fp8",
        "ATTENTION": "int8",
    }
    Worker.from_settings(Settings.from_env(variables)).close()
    run(WHOLE, **variables)


def test_nor_does_one_without_a_checkpoint(tmp_path: Path) -> None:
    put_all(tmp_path)
    variables = {
        "MODEL": "mini",
        "MODEL_ID": REPO,
        "MODEL_REVISION": COMMIT,
        "MODEL_DIR": str(tmp_path),
        "KEEP_PREPARED": "whole",
        "PRECISION_MODE": "4bit",
        "COMPUTE": "fp8",
        "ATTENTION": "int8",
    }
    Worker.from_settings(Settings.from_env(variables)).close()
    drop_weights(tmp_path)
    run(WHOLE, **variables)
