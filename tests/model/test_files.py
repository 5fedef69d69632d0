"""Where files are looked for, in which order, and what is said when they are not there."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub.hf_api import RepoFile

from image_worker.catalog import CATALOG, HubFile
from image_worker.errors import InvalidSettings, ModelMismatch, ModelUnavailable
from image_worker.model import files, in_folder
from image_worker.settings import Settings
from tests.conftest import MINI, MINI_FOLDER

ENTRY = CATALOG["edit-2509"]


def settings(**variables: Any) -> Settings:
    return Settings.from_env({name.upper(): str(value) for name, value in variables.items()})


def put_in_cache(cache: Path, repo: str, revision: str) -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    shutil.copytree(MINI_FOLDER, folder)
    return folder


def test_a_local_folder_is_used_as_it_is() -> None:
    assert files.find_model(MINI, settings()) == MINI_FOLDER
    assert files.find_model(ENTRY, settings(model_id=MINI_FOLDER)) == MINI_FOLDER


def test_the_runpod_cache_comes_before_model_dir(tmp_path: Path, monkeypatch: Any) -> None:
    cache, own = tmp_path / "runpod", tmp_path / "own"
    monkeypatch.setattr(files, "RUNPOD_CACHE", cache)
    in_own = put_in_cache(own, ENTRY.repo, ENTRY.revision)
    found = settings(model_dir=own, local_only=1)
    assert files.find_model(ENTRY, found) == in_own
    in_cache = put_in_cache(cache, ENTRY.repo, ENTRY.revision)
    assert files.find_model(ENTRY, found) == in_cache


def test_an_incomplete_cache_is_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    cache, own = tmp_path / "runpod", tmp_path / "own"
    monkeypatch.setattr(files, "RUNPOD_CACHE", cache)
    partial = put_in_cache(cache, ENTRY.repo, ENTRY.revision)
    (partial / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    whole = put_in_cache(own, ENTRY.repo, ENTRY.revision)
    assert files.find_model(ENTRY, settings(model_dir=own, local_only=1)) == whole


def test_local_only_never_downloads(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="LOCAL_ONLY=1"):
        files.find_model(ENTRY, settings(model_dir=tmp_path, local_only=1))
    with pytest.raises(ModelUnavailable, match="LOCAL_ONLY=1"):
        files.find_adapter(ENTRY.lightning[8], settings(model_dir=tmp_path, local_only=1))


class NoSnapshot:
    """Stands in for what would ask the hub, and notes what it is made of."""

    asked: ClassVar[list[tuple[str, str, Path, float]]] = []
    paths: ClassVar[list[str]] = ["transformer/config.json", "README.md"]

    def __init__(
        self, repo: str, revision: str, cache: Path, timeout: float, token: bool = True
    ) -> None:
        assert token, "the operator's own files may be private"
        self.asked.append((repo, revision, cache, timeout))

    def fetch(self, paths: Iterable[str]) -> Path:
        fetched = list(paths)
        if "README.md" in fetched:
            raise ModelUnavailable("README.md could not be downloaded")
        return MINI_FOLDER


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Path, float]]:
    monkeypatch.setattr(files, "Snapshot", NoSnapshot)
    NoSnapshot.asked.clear()
    return NoSnapshot.asked


def test_what_is_in_no_cache_is_downloaded(asked: list[Any], tmp_path: Path) -> None:
    given = settings(model_dir=tmp_path / "new", download_timeout=7)
    assert files.find_model(ENTRY, given) == MINI_FOLDER
    assert asked == [(ENTRY.repo, ENTRY.revision, tmp_path / "new", 7)]


def test_a_list_of_files_in_the_cache_is_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_in_cache(tmp_path, ENTRY.repo, ENTRY.revision)
    paths = [*(str(p.relative_to(folder)) for p in folder.rglob("*.*")), "vae/model.bin"]
    listed = [RepoFile(path=path, size=1, oid="") for path in paths]
    monkeypatch.setattr(files, "get_cached_repo_tree", lambda *_, **__: listed)
    given = settings(model_dir=tmp_path, local_only=1)
    assert files.find_model(ENTRY, given) == folder
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelUnavailable, match="LOCAL_ONLY=1"):
        files.find_model(ENTRY, given)


def test_a_model_folder_in_model_dir_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="MODEL_ID"):
        files.find_model(ENTRY, settings(model_dir=tmp_path))


def test_another_repo_is_not_asked_for_the_catalogues_commit(
    tmp_path: Path, asked: list[Any]
) -> None:
    files.find_model(ENTRY, settings(model_dir=tmp_path, model_id="me/mine"))
    files.find_model(ENTRY, settings(model_dir=tmp_path, model_id="me/mine", model_revision="v2"))
    files.find_model(ENTRY, settings(model_dir=tmp_path, model_revision="v3"))
    assert [(repo, revision) for repo, revision, *_ in asked] == [
        ("me/mine", "main"),
        ("me/mine", "v2"),
        (ENTRY.repo, "v3"),
    ]


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "scheduler", "processor"])
def test_a_folder_without_a_part_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / name)
    with pytest.raises(ModelUnavailable, match=name):
        files.find_model(dataclasses.replace(MINI, repo=str(tmp_path)), settings())


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "m-2.safetensors"}}')
    with pytest.raises(ModelUnavailable, match=r"m-2\.safetensors missing"):
        in_folder.weight_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "processor/preprocessor_config.json",
    ],
)
def test_a_folder_without_a_small_file_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(ModelUnavailable, match=name):
        files.find_model(dataclasses.replace(MINI, repo=str(tmp_path)), settings())


def test_shards_without_their_index_are_counted(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00005.safetensors").touch()
    with pytest.raises(ModelUnavailable, match="1 of 5 shards"):
        in_folder.weight_files(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_damaged_json_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelMismatch):
        in_folder.read_json(path)


@pytest.mark.parametrize("model_id", ["/nonexistent/models/x", "a/b/c", "~/nothing-there", "name"])
def test_a_mistyped_model_id_is_explained(model_id: str) -> None:
    with pytest.raises(InvalidSettings, match="MODEL_ID"):
        files.find_model(ENTRY, settings(model_id=model_id))


def test_a_revision_of_a_local_folder_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="MODEL_REVISION"):
        files.find_model(ENTRY, settings(model_id=MINI_FOLDER, model_revision="v2"))


def test_another_revision_in_the_cache_is_named(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(files, "RUNPOD_CACHE", tmp_path / "runpod")
    put_in_cache(tmp_path / "runpod", ENTRY.repo, "0123abcd")
    with pytest.raises(ModelUnavailable):
        files.find_model(ENTRY, settings(model_dir=tmp_path / "own", local_only=1))
    assert "0123abcd" in caplog.text


def test_an_adapter_is_asked_for_by_its_commit(tmp_path: Path, asked: list[Any]) -> None:
    file = ENTRY.lightning[4]
    assert files.find_adapter(file, settings(model_dir=tmp_path)) == MINI_FOLDER / file.path
    assert asked[-1][:2] == (file.repo, file.revision)


def test_a_missing_adapter_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="is missing"):
        files.find_adapter(HubFile(str(MINI_FOLDER), "loras/none.safetensors"), settings())
