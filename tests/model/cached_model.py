"""The miniature in a Hugging Face cache, as a model and a LoRA from the hub would be."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from image_worker.catalog import HubFile, ModelEntry
from image_worker.model.build import build
from image_worker.model.components import TRANSFORMER, is_modulation
from image_worker.model.hardware import detect_hardware
from image_worker.settings import Settings
from image_worker.worker import Worker, warm_up
from tests.conftest import MINI, MINI_FOLDER
from tests.worker_jobs import job

REPO, COMMIT = "someone/mini", "0123456789abcdef0123456789abcdef01234567"
LORA = HubFile("someone/loras", "lora.safetensors", "89abcdef" * 5)
ENTRY = dataclasses.replace(MINI, repo=REPO, revision=COMMIT, lightning={8: LORA})


def put(cache: Path, repo: str, commit: str, files: dict[str, Path]) -> Path:
    """Files of a repo, by their paths there, in a cache: blobs, and a snapshot that links them."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    folder = storage / "snapshots" / commit
    for name, source in files.items():
        content = source.read_bytes()
        blob = storage / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    return folder


def model_files() -> dict[str, Path]:
    """The miniature's, by their paths in its repo."""
    folders = [path for path in MINI_FOLDER.iterdir() if path.is_dir() and path.name != "loras"]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(MINI_FOLDER)): path for path in found}


def put_all(cache: Path) -> Path:
    """The model and a LoRA that changes modulation, too. Returns the model's snapshot."""
    module = TRANSFORMER.empty(MINI_FOLDER / "transformer")
    chance = torch.Generator().manual_seed(1)
    tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and (is_modulation(name) or "attn" in name):
            for part, size in (
                ("lora_A", (2, layer.in_features)),
                ("lora_B", (layer.out_features, 2)),
            ):
                tensors[f"{name}.{part}.weight"] = 0.05 * torch.randn(size, generator=chance)
    path = cache / "lora.safetensors"
    cache.mkdir(exist_ok=True)
    save_file(tensors, path)
    put(cache, LORA.repo, LORA.revision, {LORA.path: path})
    path.unlink()
    return put(cache, REPO, COMMIT, model_files())


def weights_in(cache: Path) -> list[Path]:
    """Links to weights and LoRAs."""
    return sorted(cache.glob("models--*/snapshots/**/*.safetensors"))


def drop_weights(cache: Path) -> None:
    """By hand."""
    for path in weights_in(cache):
        path.resolve().unlink()
        path.unlink()


def start(model_dir: Path, entry: ModelEntry = ENTRY, **variables: Any) -> Worker:
    """A worker, as `Worker.from_settings` makes one, for an entry that is in no catalogue."""
    given = {"model_dir": model_dir, "embed_metadata": 0, **variables}
    settings = Settings.from_env({name.upper(): str(value) for name, value in given.items()})
    return Worker(settings, build(settings, entry, detect_hardware(settings), first_edit=warm_up))


def pictures(worker: Worker, *steps: int) -> list[str]:
    """One for each number of steps."""
    replies = [worker.run_blocking(job(seed=3, num_inference_steps=count)) for count in steps]
    worker.close()
    return [reply["images"][0] for reply in replies]
