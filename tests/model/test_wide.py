"""A file in a format of its own that is decoded when it is loaded: as if it were in 32 bits."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.errors import InvalidSettings
from image_worker.model import build as build_module
from image_worker.model.components import TRANSFORMER
from image_worker.model.formats.gguf_checkpoint import GgufCheckpoint
from image_worker.model.opened import open_transformer
from image_worker.model.placement import Plan
from image_worker.model.sources import Sources
from image_worker.model.wide import Decoding
from image_worker.settings import Precision, Settings
from tests.conftest import MINI_FOLDER, read_mini
from tests.model.test_beside import LIGHTNING, config_of, gguf, of_all_layers, opened, scaled_fp8
from tests.model.test_beside_start import as_numbers, built
from tests.model.test_opening import NO_LORA, saved, steps
from tests.model.test_stream import edit, passing
from tools.full_size_files import Weights, write

DECODED = {"checkpoint_decode": "1"}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    source = read_mini(TRANSFORMER, torch.bfloat16, lora=False)
    return {name: tensor.detach().contiguous() for name, tensor in source.named_parameters()}


def nunchaku(folder: Path) -> Path:
    return write(Weights(MINI_FOLDER / "transformer"), folder, "nunchaku")


@pytest.mark.parametrize(
    ("file", "precision", "given"),
    [
        (scaled_fp8, "bf16", {}),
        (gguf, "fp8", {}),
        (nunchaku, "4bit", {"lightning_steps": "4"}),
    ],
)
def test_the_picture_is_that_of_its_numbers_in_a_file(
    file: Callable[[Path], Path], precision: Precision, given: Any, tmp_path: Path
) -> None:
    """LoRAs merged, of modulation's layers, too."""
    path = file(tmp_path)
    found = opened(path)
    every = of_all_layers(found, tmp_path)
    given = {"precision_mode": precision, "loras": [LIGHTNING, every]} | given
    model = built(checkpoint=path, **DECODED, **given)
    expected = edit(built(checkpoint=as_numbers(path, tmp_path), **given))
    assert torch.equal(edit(model), expected)
    assert model.transformer.beside is None and model.weights == precision


def test_it_is_prepared_apart_from_what_stays_in_its_format(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = gguf(tmp_path)
    kept = {"keep_prepared": "1", "model_dir": tmp_path, "checkpoint": path}
    kept |= {"precision_mode": "4bit", **NO_LORA}
    stays, decoded = (edit(built(**kept, **given, first_edit=edit)) for given in ({}, DECODED))
    assert not torch.equal(stays, decoded)
    assert len(list((tmp_path / "prepared").iterdir())) == 2
    monkeypatch.setattr(Decoding, "tensors", lambda *_: pytest.fail("decoded again"))
    again = built(**kept, **DECODED, first_edit=edit)
    assert "prepare" not in steps(again) and torch.equal(edit(again), decoded)


def test_what_is_not_loaded_is_not_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    decoded, full = [], GgufCheckpoint.full

    def watched(self: GgufCheckpoint, path: str, device: torch.device) -> Any:
        decoded.append(path)
        return full(self, path, device)

    monkeypatch.setattr(GgufCheckpoint, "full", watched)
    built(checkpoint=gguf(tmp_path), precision_mode="bf16", **DECODED, **NO_LORA)
    assert decoded and not [path for path in decoded if "_mod." in path]


@pytest.mark.parametrize("given", [{}, DECODED])
def test_readers_take_turns(given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Of modulation's layers, each of which is decoded on the card."""
    inside, most, full = [0], [0], GgufCheckpoint.full

    def watched(self: GgufCheckpoint, path: str, device: torch.device) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        inside[0] -= 1
        return full(self, path, device)

    model = built(checkpoint=gguf(tmp_path), precision_mode="bf16", **given)
    monkeypatch.setattr(GgufCheckpoint, "full", watched)
    model.transformer.prepare([0.5])
    assert most == [1]


def test_one_weight_at_a_time_is_decoded(tmp_path: Path, monkeypatch: Any) -> None:
    alive, most, full = weakref.WeakSet[Tensor](), [0], GgufCheckpoint.full

    def watched(self: GgufCheckpoint, path: str, device: torch.device) -> Any:
        weight, bias = full(self, path, device)
        weight = weight.clone()  # of its own, not of the file's memory
        alive.add(weight)
        most[0] = max(most[0], len(alive))
        return weight, bias

    monkeypatch.setattr(GgufCheckpoint, "full", watched)
    settings = {"checkpoint": gguf(tmp_path), "precision_mode": "4bit", **NO_LORA}
    built(**settings, **DECODED)
    assert most == [1]


def test_what_it_holds_passes_like_any_other(tmp_path: Path, monkeypatch: Any) -> None:
    given = {"checkpoint": gguf(tmp_path), "precision_mode": "4bit", **DECODED}
    stays = built(**given)
    expected = edit(stays)
    found = Plan("4bit", passing(stays, every=True))
    monkeypatch.setattr(build_module, "plan", lambda *_: found)
    assert torch.equal(edit(built(**given)), expected)


def test_a_file_in_16_bits_has_nothing_to_decode(base: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"CHECKPOINT_DECODE=1 has no meaning with file\.bin"):
        built(checkpoint=saved(base, tmp_path), **DECODED)


def test_ranges_are_for_weights_that_are_quantised_here(tmp_path: Path) -> None:
    path = gguf(tmp_path)
    ranges = MINI_FOLDER / "svdq-ranges.safetensors"
    named = {"CHECKPOINT": str(path), "PRECISION_MODE": "svdq", "SVDQ_RANGES": str(ranges)}
    config = config_of(opened(path))
    sources = Sources(MINI_FOLDER, (), checkpoint=path, ranges=ranges)
    with pytest.raises(InvalidSettings, match="have them decoded with CHECKPOINT_DECODE=1"):
        open_transformer(sources, Settings.from_env(named), vars(config))
    decoded = Settings.from_env(named | {"CHECKPOINT_DECODE": "1"})
    assert isinstance(open_transformer(sources, decoded, vars(config)), Decoding)
