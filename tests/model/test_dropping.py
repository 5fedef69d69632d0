"""A checkpoint is removed from `MODEL_DIR`'s cache, and from nowhere else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from image_worker.errors import InvalidSettings
from image_worker.model import dropping, files
from image_worker.settings import Settings
from tests.conftest import MINI, MINI_FOLDER
from tests.model.cached_model import ENTRY, LORA, REPO, model_files, put, put_all, weights_in

OTHER = "fedcba98" * 5


def settings(model_dir: Path, **variables: Any) -> Settings:
    given = {"model_dir": model_dir, **variables}
    return Settings.from_env({name.upper(): str(value) for name, value in given.items()})


def blobs(cache: Path, repo: str = REPO) -> set[Path]:
    return set((cache / f"models--{repo.replace('/', '--')}" / "blobs").iterdir())


def test_weights_and_their_blobs_go_and_what_is_small_stays(tmp_path: Path) -> None:
    folder = put_all(tmp_path)
    links = weights_in(tmp_path)
    sizes = sum(path.stat().st_size for path in links)
    small = {path for path in folder.rglob("*") if path.is_file()} - set(links)
    given = settings(tmp_path)
    dropping.check(ENTRY, given)
    assert dropping.drop(ENTRY, given) == sizes
    assert weights_in(tmp_path) == [] and blobs(tmp_path, LORA.repo) == set()
    assert all(path.read_bytes() is not None for path in small)
    assert blobs(tmp_path) == {path.resolve() for path in small}
    dropping.check(ENTRY, given)
    assert dropping.drop(ENTRY, given) == 0


def test_a_blob_that_another_revision_needs_stays(tmp_path: Path) -> None:
    put_all(tmp_path)
    vae = "vae/diffusion_pytorch_model.safetensors"
    kept = put(tmp_path, REPO, OTHER, {vae: MINI_FOLDER / vae}) / vae
    sizes = sum(path.stat().st_size for path in weights_in(tmp_path) if path.name != kept.name)
    transformer = MINI_FOLDER / "transformer" / kept.name
    assert dropping.drop(ENTRY, settings(tmp_path)) == sizes + transformer.stat().st_size
    assert weights_in(tmp_path) == [kept]
    assert kept.read_bytes() == (MINI_FOLDER / vae).read_bytes()


def test_who_was_killed_between_blob_and_link_goes_on(tmp_path: Path) -> None:
    put_all(tmp_path)
    first = weights_in(tmp_path)[0]
    first.resolve().unlink()
    dropping.drop(ENTRY, settings(tmp_path))
    assert weights_in(tmp_path) == []


def test_a_cache_without_links_has_files_in_place_of_them(tmp_path: Path) -> None:
    folder = put_all(tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.resolve().replace(path)
    size = path.stat().st_size
    assert dropping.drop(ENTRY, settings(tmp_path, use_lightning_lora=0)) > size
    assert not path.exists()


def test_what_a_link_leads_to_elsewhere_stays(tmp_path: Path) -> None:
    folder = put_all(tmp_path)
    path, outside = folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "mine"
    path.resolve().replace(outside)
    path.unlink()
    path.symlink_to(outside)
    dropping.drop(ENTRY, settings(tmp_path))
    assert outside.exists() and not path.is_symlink()


def test_loras_are_left_where_none_is_merged(tmp_path: Path) -> None:
    put_all(tmp_path)
    dropping.drop(ENTRY, settings(tmp_path, use_lightning_lora=0))
    assert [path.name for path in weights_in(tmp_path)] == [LORA.path]


def test_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="local folder"):
        dropping.check(MINI, settings(tmp_path))
    folder = put_all(tmp_path)
    with pytest.raises(InvalidSettings, match="local folder"):
        dropping.check(ENTRY, settings(tmp_path, model_id=folder))
    with pytest.raises(InvalidSettings, match="local folder"):
        dropping.check(dataclasses.replace(ENTRY, repo=str(folder)), settings(tmp_path))


def test_runpods_cache_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    cache, own = tmp_path / "runpod", tmp_path / "own"
    monkeypatch.setattr(files, "RUNPOD_CACHE", cache)
    put_all(own)
    put(cache, REPO, ENTRY.revision, model_files())
    for model_dir in (own, cache):
        with pytest.raises(InvalidSettings, match="RunPod's cache"):
            dropping.check(ENTRY, settings(model_dir))
