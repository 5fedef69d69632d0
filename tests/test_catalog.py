"""The tables hold together, and a checkpoint's scheduler is either understood or refused."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest

from image_worker.catalog import CATALOG, Sampler, choose
from image_worker.errors import ModelMismatch
from image_worker.settings import ModelName
from tests.conftest import MINI_FOLDER

CONFIG = json.loads((MINI_FOLDER / "scheduler" / "scheduler_config.json").read_text())


def test_every_setting_names_an_entry() -> None:
    assert set(get_args(ModelName)) - {"auto"} == set(CATALOG)


def test_every_model_has_both_lightning_files() -> None:
    for entry in CATALOG.values():
        assert set(entry.lightning) == {4, 8}
        for steps, file in entry.lightning.items():
            assert f"{steps}steps" in file.path


def test_revisions_are_commits_or_main() -> None:
    for entry in CATALOG.values():
        assert entry.name == "mini" or re.fullmatch(r"[0-9a-f]{40}", entry.revision)
        for file in entry.lightning.values():
            assert re.fullmatch(r"[0-9a-f]{40}|main", file.revision)


def test_no_two_models_share_a_repo_or_a_lora() -> None:
    repos = [entry.repo for entry in CATALOG.values()]
    loras = [file for entry in CATALOG.values() for file in entry.lightning.values()]
    assert len(set(repos)) == len(repos) and len(set(loras)) == len(loras)
    for entry in CATALOG.values():
        assert CATALOG[entry.name] is entry
        assert entry.name == "mini" or re.fullmatch(r"Qwen/Qwen-Image[\w-]*", entry.repo)
        assert all(file.path.endswith(".safetensors") for file in entry.lightning.values())


def test_auto_looks_at_the_machine_and_nothing_else_does() -> None:
    assert choose("auto", has_card=True).name == "edit-2509"
    assert choose("auto", has_card=False).name == "mini"
    assert choose("edit-2511", has_card=False).name == "edit-2511"


def test_the_templates_number_their_pictures() -> None:
    text = CATALOG["edit-2509"].template.render("blur {it}", 2)
    assert "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: " in text
    assert "blur {it}<|im_end|>" in text
    assert "Picture" not in CATALOG["edit"].template.render("blur it", 1)


def test_the_scheduler_is_read() -> None:
    assert Sampler.from_config(CONFIG) == Sampler(0.5, 0.9, 256, 8192, 0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "EulerDiscreteScheduler"},
        {"use_dynamic_shifting": False},
        {"time_shift_type": "linear"},
        {"use_karras_sigmas": True},
    ],
)
def test_another_scheduler_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelMismatch, match=next(iter(change))):
        Sampler.from_config(CONFIG | change)
