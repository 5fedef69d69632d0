"""Whole prepared weights: a start without checkpoint, LoRAs and network makes the same picture."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import weakref
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from image_worker.errors import CardLost, ModelUnavailable
from image_worker.model import components, files, in_folder, layers, prepared, weights
from image_worker.model.prepared import MANIFEST, Prepared
from image_worker.settings import Precision, Settings
from tests.conftest import MINI_FOLDER
from tests.model import cached_model, fake_hub
from tests.model.cached_model import (
    COMMIT,
    ENTRY,
    LORA,
    REPO,
    drop_weights,
    model_files,
    pictures,
    put_all,
    start,
)
from tests.model.damaged import damage
from tests.worker_jobs import job

NEVER_USED = 5  # steps: no start makes the tables of such a schedule
LAYER = "transformer_blocks.1.img_mod.1"
FILE = f"modulation/{LAYER}.safetensors"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: Any) -> None:
    monkeypatch.setattr(prepared, "CHUNK", 20_000)


@pytest.fixture
def no_network(monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("asked the hub")

    monkeypatch.setattr(files, "Snapshot", fail)


def folders(model_dir: Path) -> list[Path]:
    return sorted(path for path in (model_dir / "prepared").iterdir() if path.name[0] != ".")


def whole_of(model_dir: Path) -> Path:
    [found] = [path for path in folders(model_dir) if path.name.endswith("-whole")]
    return found


def step_names(worker: Any) -> list[str]:
    return [step.name for step in worker.model.cold_start.steps]


@pytest.mark.parametrize("precision", ["bf16", "4bit"])
def test_the_same_picture_without_checkpoint_and_network(
    precision: str, tmp_path: Path, no_network: None
) -> None:
    put_all(tmp_path)
    given = {"precision_mode": precision}
    expected = pictures(start(tmp_path, keep_prepared=0, **given), 2, NEVER_USED)
    without = pictures(start(tmp_path, keep_prepared=0, use_lightning_lora=0, **given), 2)
    assert without != expected[:1], "the LoRA has an effect"
    first = start(tmp_path, keep_prepared="whole", **given)
    assert first.model.cold_start.prepared
    drop_weights(tmp_path)
    assert pictures(first, 2, NEVER_USED) == expected, "it reads from there from now on"
    for kept in ("whole", "1"):
        later = start(tmp_path, keep_prepared=kept, **given)
        assert "prepare" not in step_names(later) and step_names(later).count("find files") == 1
        assert pictures(later, 2, NEVER_USED) == expected


def test_layers_are_stored_in_the_type_that_computes_with_loras(tmp_path: Path) -> None:
    put_all(tmp_path)
    worker = start(tmp_path, keep_prepared="whole", precision_mode="4bit")
    worker.close()
    recipe_layers = worker.model.transformer.modulation
    stored = {path.name for path in (whole_of(tmp_path) / "modulation").iterdir()}
    assert stored == {f"{name}.safetensors" for name in recipe_layers.layers}
    shards = in_folder.weight_files(MINI_FOLDER / "transformer")
    plain, bias = weights.Layers(shards, [], worker.model.dtype)(LAYER)
    merged = recipe_layers.read(LAYER)
    assert merged[0].dtype == worker.model.dtype and merged[0].shape == plain.shape
    assert not torch.equal(merged[0], plain) and torch.equal(merged[1], bias)


def test_no_more_than_one_layer_is_in_memory_while_they_are_written(
    tmp_path: Path, monkeypatch: Any
) -> None:
    put_all(tmp_path)
    stock, write = weights.Layers.__call__, prepared._write_file
    alive: set[int] = set()
    most, reads = 0, []

    def read(self: Any, path: str) -> Any:
        nonlocal most
        found = stock(self, path)
        for tensor in found:
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
        reads.append(path)
        most = max(most, len(alive))
        return found

    def write_one(*arguments: Any) -> Any:
        assert not alive
        return write(*arguments)

    monkeypatch.setattr(weights.Layers, "__call__", read)
    monkeypatch.setattr(prepared, "_write_file", write_one)
    monkeypatch.setattr(cached_model, "warm_up", None)  # which reads layers, too
    worker = start(tmp_path, keep_prepared="whole")
    worker.close()
    assert sorted(reads) == sorted(worker.model.transformer.modulation.layers), "each one once"
    assert most == 2, "a weight and a bias"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder, to be copied."""
    folder = tmp_path_factory.mktemp("written")
    put_all(folder)
    start(folder, keep_prepared="whole").close()
    return whole_of(folder)


@pytest.mark.parametrize("how", ["header", "middle", "last chunk", "cut off", "missing"])
def test_any_damage_of_a_layer_is_found(how: str, written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "copy-whole")
    found = Prepared.find(folder)
    assert found is not None
    read = layers.PreparedLayers(found)
    weight, bias = read(LAYER)
    assert len(weight) == len(bias)
    damage(folder / FILE, how)
    with pytest.raises(CardLost, match=FILE):
        read(LAYER)
    assert not folder.exists()


def test_a_damaged_layer_is_found_when_it_is_used(tmp_path: Path, caplog: Any) -> None:
    put_all(tmp_path)
    worker = start(tmp_path, keep_prepared="whole")
    expected = pictures(start(tmp_path, keep_prepared="0"), NEVER_USED)
    damage(whole_of(tmp_path) / FILE, "middle")
    reply = worker.run_blocking(job(num_inference_steps=NEVER_USED))
    worker.close()
    assert reply["error"]["type"] == "card_lost" and worker.broken
    assert FILE in caplog.text
    assert folders(tmp_path) == [], "the next start makes it again"
    with pytest.raises(CardLost, match=FILE):
        worker.model.transformer.modulation.read("norm_out.linear")
    assert pictures(start(tmp_path, keep_prepared="whole"), NEVER_USED) == expected
    assert whole_of(tmp_path)


def test_what_somebody_made_again_meanwhile_is_left_alone(tmp_path: Path) -> None:
    put_all(tmp_path)
    worker = start(tmp_path, keep_prepared="whole")
    worker.close()
    folder = whole_of(tmp_path)
    (folder / FILE).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][FILE]["sums"][0] = "another"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CardLost, match=LAYER):
        worker.model.transformer.modulation.read(LAYER)
    assert folder.exists()


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_what_is_missing_at_the_start_is_made_again(name: str, tmp_path: Path, caplog: Any) -> None:
    put_all(tmp_path)
    expected = pictures(start(tmp_path, keep_prepared="whole"), 2)
    (whole_of(tmp_path) / name).unlink()
    again = start(tmp_path, keep_prepared="whole")
    assert name.rpartition("/")[2] in caplog.text and "prepare" in step_names(again)
    assert pictures(again, 2) == expected
    drop_weights(tmp_path)
    (whole_of(tmp_path) / name).unlink()
    with pytest.raises(ModelUnavailable, match=r"safetensors.* missing.*LOCAL_ONLY=1|-whole"):
        start(tmp_path, keep_prepared="whole", local_only=1)


def test_others_are_not_taken_for_whole_ones(tmp_path: Path) -> None:
    put_all(tmp_path)
    start(tmp_path, keep_prepared="1").close()
    [plain] = folders(tmp_path)
    worker = start(tmp_path, keep_prepared="whole")
    worker.close()
    assert "prepare" in step_names(worker)
    assert folders(tmp_path) == [plain, plain.with_name(f"{plain.name}-whole")]
    shutil.rmtree(plain)
    later = start(tmp_path, keep_prepared="1")
    later.close()
    assert "prepare" not in step_names(later) and not plain.exists(), "whole ones do"


def test_others_need_the_checkpoint(tmp_path: Path, no_network: None) -> None:
    put_all(tmp_path)
    start(tmp_path, keep_prepared="1").close()
    drop_weights(tmp_path)
    with pytest.raises(ModelUnavailable) as caught:
        start(tmp_path, keep_prepared="1", local_only=1)
    for part in (REPO, "text_encoder/", ".safetensors", "missing", "LOCAL_ONLY=1"):
        assert part in str(caught.value)


def test_whole_ones_of_another_kind_do_not_do(tmp_path: Path) -> None:
    put_all(tmp_path)
    start(tmp_path, keep_prepared="whole").close()
    drop_weights(tmp_path)
    for given in ({"precision_mode": "4bit"}, {"use_lightning_lora": "0"}):
        with pytest.raises(ModelUnavailable, match=r"prepared/mini-\w+-\w+-whole.*LOCAL_ONLY=1"):
            start(tmp_path, keep_prepared="1", local_only=1, **given)


def test_a_lora_that_is_not_there_is_not_asked_for(tmp_path: Path, no_network: None) -> None:
    put_all(tmp_path)
    expected = pictures(start(tmp_path, keep_prepared="whole"), NEVER_USED)
    shutil.rmtree(tmp_path / "models--someone--loras")
    assert pictures(start(tmp_path, keep_prepared="whole"), NEVER_USED) == expected


def test_a_branch_is_known_by_what_the_cache_says_of_it(tmp_path: Path, no_network: None) -> None:
    put_all(tmp_path)
    for repo, commit in (("someone--mini", COMMIT), ("someone--loras", LORA.revision)):
        refs = tmp_path / f"models--{repo}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(commit)
    lora = dataclasses.replace(LORA, revision="main")
    entry = dataclasses.replace(ENTRY, revision="main", lightning={8: lora})
    expected = pictures(start(tmp_path, entry, keep_prepared="whole"), NEVER_USED)
    drop_weights(tmp_path)
    assert pictures(start(tmp_path, entry, keep_prepared="whole"), NEVER_USED) == expected
    assert pictures(start(tmp_path, keep_prepared="whole"), NEVER_USED) == expected, "one key"


def test_only_what_is_small_is_downloaded(tmp_path: Path, monkeypatch: Any) -> None:
    entry = dataclasses.replace(ENTRY, repo=fake_hub.REPO)
    given = {"keep_prepared": "whole", "use_lightning_lora": 0}
    contents = {name: path.read_bytes() for name, path in model_files().items()}
    with fake_hub.only(fake_hub.Hub(contents), monkeypatch) as hub:
        expected = pictures(start(tmp_path, entry, **given), NEVER_USED)
        shutil.rmtree(tmp_path / f"models--{fake_hub.REPO.replace('/', '--')}")
        hub.asked.clear()
        later = start(tmp_path, entry, **given)
        assert {path for path, _ in hub.asked} == {
            path for path in contents if not path.endswith(".safetensors")
        }
        assert pictures(later, NEVER_USED) == expected
        other = start(tmp_path, entry, precision_mode="4bit", **given)
        other.close()
        assert {path for path, _ in hub.asked} == set(contents)
        assert step_names(other)[:2] == ["find files", "find files"]
        assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("quantised", ["all", "text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_are_the_same_with_and_without_files(quantised: str, dtype: Any) -> None:
    settings = Settings.from_env({"QUANTIZE_COMPONENTS": quantised})
    found, made = (
        components.sizes(MINI_FOLDER, settings, dtype, has_weights=there) for there in (True, False)
    )
    assert found == made and set(found) == set(get_args(Precision))
    assert all(size.rest and all(map(sum, size.blocks.values())) for size in found.values())


def test_a_disk_that_does_not_answer_costs_no_folder(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    put_all(tmp_path)
    worker = start(tmp_path, keep_prepared="whole")
    worker.close()
    monkeypatch.setattr(layers, "read_into", fails)
    with pytest.raises(CardLost, match="try again on another worker"):
        worker.model.transformer.modulation.read(LAYER)
    assert (whole_of(tmp_path) / FILE).is_file()
