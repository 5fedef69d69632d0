"""What tells models and LoRAs apart, without reading them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from image_worker.errors import ModelUnavailable
from image_worker.model import sources
from tests.conftest import MINI_FOLDER

COMMIT = "0123456789" * 4


def test_only_a_cache_is_taken_for_one(tmp_path: Path) -> None:
    own = tmp_path / "snapshots" / "mine" / "a.safetensors"
    cached = tmp_path / "hub" / "models--a--b" / "snapshots" / COMMIT / "vae" / "a.safetensors"
    for path in (own, cached):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    before = [sources.facts_of_files([path]) for path in (own, cached)]
    for path in (own, cached):
        os.utime(path, (1, 1))
    after = [sources.facts_of_files([path]) for path in (own, cached)]
    assert before[0] != after[0] and before[1] == after[1]
    assert after[1] == [["a--b", COMMIT, "vae/a.safetensors"]]
    cached.unlink()
    assert sources.facts_of_files([cached]) == after[1]


def test_of_a_cache_the_commit_says_which_model_it_is(tmp_path: Path) -> None:
    for cache in ("one", "other"):
        folder = tmp_path / cache / "models--a--b" / "snapshots" / COMMIT
        assert sources.facts_of_model(folder, {}) == [["a--b", COMMIT]]


def test_of_another_folder_the_files_do(tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER, tmp_path, dirs_exist_ok=True)
    found = sources.facts_of_model(tmp_path, {})
    assert len(found) == 3
    shard = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(shard)
    assert sources.facts_of_model(tmp_path, {}) != found
    shard.unlink()
    with pytest.raises(ModelUnavailable, match="vae"):
        sources.facts_of_model(tmp_path, {})


def test_beside_a_checkpoint_the_models_own_transformer_does_not_count(tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "file.gguf"
    file.write_bytes(b"x")
    single = {"transformer": file}
    found = sources.facts_of_model(tmp_path, single)
    shutil.rmtree(tmp_path / "transformer")
    assert sources.facts_of_model(tmp_path, single) == found
    file.write_bytes(b"xy")
    assert sources.facts_of_model(tmp_path, single) != found
