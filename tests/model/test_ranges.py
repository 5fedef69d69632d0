"""Activation ranges: recorded as upstream's module shows them, kept, refused, and used."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from image_worker.commands.places import look_at_places
from image_worker.errors import BrokenPicture, InvalidSettings, ModelMismatch, ModelUnavailable
from image_worker.model import build as build_module
from image_worker.model import ranges, sources
from image_worker.model.components import TRANSFORMER
from image_worker.model.formats import decomposition
from image_worker.model.in_folder import read_json
from image_worker.model.packed import slots
from image_worker.model.placement import Plan
from image_worker.model.ranges import KIND, Recorder
from image_worker.model.stream import Held
from image_worker.model.transformer import Transformer, velocities
from image_worker.settings import Settings
from tests import upstream
from tests.conftest import MINI, MINI_FOLDER, build_mini, read_mini
from tests.model.test_products import row
from tests.model.test_scaled_fp8 import checkpoint, quantised, weights

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # float32, in another order
ROWS = [row(8, 0, 21, 1), row(6, 0, 5, 2)]  # without references: then no token is left out
LAST = "transformer_blocks.6."
UNREAD = {f"{LAST}{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
CONFIG = read_json(MINI_FOLDER / "transformer" / "config.json")


def source() -> Any:
    return read_mini(TRANSFORMER, torch.float32)


def served(of: Any) -> Transformer:
    return Transformer(copy.deepcopy(of), CPU, torch.float32, round_to=None).eval()


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


@torch.inference_mode()
def by_upstream(of: Any) -> dict[str, Tensor]:
    """By torch's own hooks on diffusers' module."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    module = upstream.transformer(of)
    for name in ranges.layers_of(of.config):

        def keep(_: nn.Module, given: Any, name: str = name) -> None:
            seen[name].append(given[0].flatten(0, -2))

        module.get_submodule(name).register_forward_pre_hook(keep)
    for given in ROWS:
        run_stock(module, given)
    return {name: torch.cat(parts).square().mean(dim=0).sqrt() for name, parts in seen.items()}


def run_stock(module: Any, given: Any) -> None:
    module(
        hidden_states=given.image[None],
        encoder_hidden_states=given.text[None],
        timestep=torch.tensor([given.timestep]).to(given.image),
        img_shapes=[list(given.shapes)],
    )


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected) - UNREAD
    for name, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[name], rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("streamed", [(), (0, 2, 3, 6)])
def test_what_is_recorded_is_what_upstreams_layers_read(streamed: tuple[int, ...]) -> None:
    of = source()
    transformer = served(of)
    held = {n: Held.of(list(slots(transformer.blocks[n])), CPU) for n in streamed}
    transformer.blocks.stream(held, CPU)
    before = velocities(transformer, ROWS)
    with ranges.watch_served(transformer) as recorder:
        seen = velocities(transformer, ROWS)
    assert hooks(transformer) == 0
    assert recorder.forwards == 1
    assert_alike(recorder.ranges(), by_upstream(of))
    assert all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))


def test_upstreams_module_can_be_watched_itself() -> None:
    of = source()
    module = upstream.transformer(of)
    with torch.no_grad(), ranges.watch(module, ranges.layers_of(of.config)) as recorder:
        for given in ROWS:
            run_stock(module, given)
    assert hooks(module) == 0 and recorder.forwards == 2
    expected, found = by_upstream(of), recorder.ranges()
    assert set(found) > UNREAD
    assert_alike({name: found[name] for name in set(found) - UNREAD}, expected)


def test_rounded_inputs_are_not_recorded() -> None:
    transformer = Transformer(
        read_mini(TRANSFORMER, torch.float32, "4bit"), CPU, torch.float32, round_to=torch.int8
    )
    with pytest.raises(ValueError, match="COMPUTE=bf16"), ranges.watch_served(transformer):
        pass
    assert hooks(transformer) == 0


def test_what_overflowed_is_not_written(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.add(["transformer_blocks.0.attn.to_q"], torch.full((2, 128), float("inf")))
    with pytest.raises(BrokenPicture, match=r"0\.attn\.to_q"):
        ranges.write(tmp_path / "r.safetensors", recorder, source().config)
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_what_was_recorded(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "r.safetensors"
    name = "transformer_blocks.2.attn.to_k"
    recorder.add([name], torch.tensor([[3.0] * 128, [4.0] * 128]))
    recorder.add([name], torch.zeros(2, 1, 128))
    assert ranges.write(path, recorder, source().config) == 83
    found = ranges.of_file(path, CONFIG)
    assert torch.equal(found.layers[name], torch.full((128,), 2.5))
    assert found.digest and not found.layers["transformer_blocks.1.attn.to_k"].any()
    assert list(tmp_path.iterdir()) == [path]


Change = Callable[[dict[str, Tensor]], None]
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda found: found.pop(QUERY), r"lacks 1 of the model's 84 .*\.0\.attn\.to_q"),
        (lambda found: found.update(x=torch.ones(1)), "1 layers that the model does not .*: x"),
        (lambda found: found.update({QUERY: torch.ones(127)}), r"float32 \(127,\); .*\(128,\)"),
        (lambda found: found.update({QUERY: torch.ones(128).half()}), r"as float16 \(128,\)"),
        (lambda found: found[QUERY].__setitem__(5, float("nan")), "below 0, infinite or NaN"),
        (lambda found: found[QUERY].__setitem__(5, float("inf")), "below 0, infinite or NaN"),
        (lambda found: found[QUERY].__setitem__(5, -1.0), "below 0, infinite or NaN"),
    ],
)
def test_a_wrong_file_is_refused(change: Change, complaint: str, tmp_path: Path) -> None:
    assert MINI.ranges
    found = load_file(MINI.ranges)
    change(found)
    save_file(found, tmp_path / "r.safetensors", {"kind": KIND})
    with pytest.raises(ModelMismatch, match=complaint):
        ranges.of_file(tmp_path / "r.safetensors", CONFIG)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    assert MINI.ranges
    path = tmp_path / "r.safetensors"
    path.write_bytes(MINI.ranges.read_bytes()[:-1])
    with pytest.raises(ModelMismatch, match="cut off"):
        ranges.of_file(path, CONFIG)
    with pytest.raises(ModelMismatch, match="no file of activation ranges"):
        ranges.of_file(MINI_FOLDER / MINI.lightning[8].path, CONFIG)
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        ranges.of_file(tmp_path / "none.safetensors", CONFIG)


def svdq(folder: Path, **variables: str) -> Any:
    return build_mini(precision_mode="svdq", keep_prepared="1", model_dir=str(folder), **variables)


def test_ranges_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """By a start and, before it, by the doctor."""
    message = "SVDQ_RANGES=/nowhere/r.safetensors is no file"
    with pytest.raises(ModelUnavailable, match=message):
        svdq(tmp_path, svdq_ranges="/nowhere/r.safetensors")
    settings = Settings(precision_mode="svdq", svdq_ranges=Path("/nowhere/r.safetensors"))
    assert message in str(look_at_places(settings, MINI).problem)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, MINI.ranges),
        ({"quantize_components": "text"}, None),
        ({"precision_mode": "4bit"}, None),
        ({"model_id": "someone/another"}, None),
        ({"checkpoint": "another.gguf"}, None),
        ({"svdq_ranges": MINI.ranges, "model_id": "someone/another"}, MINI.ranges),
    ],
)
def test_a_models_own_ranges_are_for_its_own_weights(
    variables: dict[str, Any], expected: Path | None
) -> None:
    settings = Settings(**{"precision_mode": "svdq"} | variables)
    assert sources.ranges_of(MINI, settings) == expected


def test_a_start_refuses_ranges_for_weights_that_are_in_few_bits_already(tmp_path: Path) -> None:
    path = checkpoint(quantised(weights()), tmp_path).path
    with pytest.raises(InvalidSettings, match="SVDQ_RANGES has no meaning with"):
        svdq(tmp_path, checkpoint=str(path), checkpoint_lightning="8", svdq_ranges=str(MINI.ranges))


def test_rank_and_ranges_make_prepared_weights_of_their_own(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """Of rank 128, read again, passing through the card; then with other ranges."""
    assert MINI.ranges
    monkeypatch.setattr(decomposition, "_ROUNDS", 1)  # these take most of the time
    prepared = tmp_path / "prepared"
    made = svdq(tmp_path, svdq_rank="128")
    assert made.transformer.blocks[0].qkv.weights[0].up.shape[1] == 128
    [first] = prepared.iterdir()
    streamed = frozenset(f"transformer/blocks.{number:02d}" for number in range(7))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(build_module, "plan", lambda *_: Plan("svdq", streamed))
        again = svdq(tmp_path, svdq_rank="128")
    assert "damaged" not in caplog.text and list(prepared.iterdir()) == [first]
    pair = (made.transformer, again.transformer)
    assert all(
        torch.equal(a, b) for a, b in zip(*(velocities(one, ROWS) for one in pair), strict=True)
    )
    other = load_file(MINI.ranges)
    other[QUERY] *= torch.linspace(0.1, 10, 128)
    save_file(other, tmp_path / "other.safetensors", {"kind": KIND})
    changed = svdq(tmp_path, svdq_rank="128", svdq_ranges=str(tmp_path / "other.safetensors"))
    assert len(list(prepared.iterdir())) == 2
    ours, theirs = (one.blocks[0].qkv.weights[0].inverse for one in (pair[0], changed.transformer))
    assert not torch.equal(ours[0], theirs[0])  # to_q
    assert torch.equal(ours[1:], theirs[1:])
    svdq(tmp_path)
    assert len(list(prepared.iterdir())) == 3
