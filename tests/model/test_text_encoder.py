"""The text encoder equals transformers': on the miniature, and on small random ones unlike it.

Without pictures to the bit. With them two sums are in another order: a patch's embedding is a
product here and a convolution upstream; and where windows are cut off, a picture's patches stand in
another order when each sees all. So float32 agrees to 1e-5 of the result's length, and float64 to
1e-6, since both round to float32 within; bf16 is at most 1.5 times as far from that as upstream's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from image_worker.errors import ModelMismatch
from image_worker.model.text_config import read_config
from image_worker.model.text_encoder import TextEncoder, positions
from image_worker.model.vision_tower import Grid
from tests import upstream
from tests.conftest import MINI_FOLDER

MINI: dict[str, Any] = json.loads((MINI_FOLDER / "text_encoder" / "config.json").read_text())
ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]}
# Unlike the miniature in every number, in the layout that most published checkpoints have.
FLAT: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 50,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50_000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "sliding_window": 32_768,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "image_token_id": 7,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 4,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 52,
        "num_heads": 3,
        "in_chans": 3,
        "out_hidden_size": 96,
        "patch_size": 4,
        "spatial_merge_size": 3,
        "temporal_patch_size": 1,
        "window_size": 24,  # 2 tokens a side
        "fullatt_block_indexes": [0, 2],
    },
}
# One key for every head, no window that cuts anything, all layers within windows.
PLAIN = FLAT | {
    "num_key_value_heads": 6,
    "vision_config": FLAT["vision_config"]
    | {"spatial_merge_size": 2, "window_size": 800, "fullatt_block_indexes": []},
}
CONFIGS = {"mini": MINI, "flat": FLAT, "plain": PLAIN}
# In tokens: one, less than a window, windows cut off at either edge or both, and several pictures.
SIZES: list[list[Grid]] = [
    [],
    [(1, 1)],
    [(4, 4)],
    [(3, 5)],
    [(8, 4)],
    [(9, 7)],
    [(6, 5), (6, 5)],
    [(2, 9), (4, 4), (7, 3)],
]


@functools.cache
def both(name: str, dtype: torch.dtype) -> tuple[TextEncoder, Any]:
    """Ours and transformers', of the same weights."""
    config = CONFIGS[name]
    if name == "mini":
        theirs = upstream.text_encoder(dtype)
    else:
        torch.manual_seed(0)
        theirs = Qwen2_5_VLModel(Qwen2_5_VLConfig(**copy.deepcopy(config))).eval()  # it writes
        for parameter in theirs.parameters():  # gains and biases, too
            values = torch.randn_like(parameter) * parameter[0].numel() ** -0.5
            values += parameter.ndim == 1
            parameter.data = values.bfloat16().to(dtype)  # the same in every type
    with torch.device("meta"):
        ours = TextEncoder(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def grids_of(name: str, sizes: list[Grid]) -> tuple[Grid, ...]:
    merge = CONFIGS[name]["vision_config"]["spatial_merge_size"]
    return tuple((rows * merge, columns * merge) for rows, columns in sizes)


def prompt(name: str, sizes: list[Grid], text: tuple[int, int, int] = (3, 2, 4)) -> Tensor:
    """Ids: text before, between and after pictures, of so many tokens."""
    image = CONFIGS[name]["image_token_id"]
    words = itertools.cycle(number for number in range(9, 40))
    before, between, after = text
    ids = [next(words) for _ in range(before)]
    for number, (rows, columns) in enumerate(sizes):
        ids += [next(words) for _ in range(between if number else 0)]
        ids += [image] * rows * columns
    return torch.tensor(ids + [next(words) for _ in range(after)])


def seen(name: str, sizes: list[Grid]) -> Tensor | None:
    vision = CONFIGS[name]["vision_config"]
    values = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    count = sum(rows * columns for rows, columns in grids_of(name, sizes))
    return torch.randn(count, values) if count else None


@torch.inference_mode()
def run(
    name: str, dtype: torch.dtype, ids: Tensor, sizes: list[Grid], patches: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The hidden states, ours and transformers'."""
    ours, theirs = both(name, dtype)
    grids = grids_of(name, sizes)
    given: dict[str, Tensor] = {}
    if patches is not None:
        given["pixel_values"] = patches
        given["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
        given["mm_token_type_ids"] = (ids == CONFIGS[name]["image_token_id"]).long()[None]
    expected = theirs(ids[None], attention_mask=torch.ones_like(ids)[None], **given)
    return ours(ids, patches, grids), expected.last_hidden_state[0]


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance, relative to the expected result's length."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_upstream(name: str, sizes: list[Grid]) -> None:
    ids, patches = prompt(name, sizes), seen(name, sizes)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        found, expected = run(name, dtype, ids, sizes, patches)
        assert found.dtype == expected.dtype == dtype and found.std() > 0.1
        assert apart(found, expected) < tolerance
        assert sizes or torch.equal(found, expected)
    found, theirs = run(name, torch.bfloat16, ids, sizes, patches)
    assert found.dtype == torch.bfloat16
    assert apart(found, expected) < 1.5 * apart(theirs, expected)
    assert sizes or torch.equal(found, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_summed_in_upstreams_order_is_equal_to_the_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both(name, dtype)
    monkeypatch.setattr(ours.visual.patch_embed, "forward", theirs.visual.patch_embed.forward)
    for sizes in ([(4, 4)], [(8, 4)], [(4, 8), (4, 4), (8, 8)]):  # whole windows
        found, expected = run(name, dtype, prompt(name, sizes), sizes, seen(name, sizes))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("text", [(0, 1, 1), (5, 1, 0), (0, 3, 0), (1, 4, 30)])
@pytest.mark.parametrize("sizes", SIZES[1:])
def test_pictures_may_stand_anywhere(sizes: list[Grid], text: tuple[int, int, int]) -> None:
    ids, grids = prompt("mini", sizes, text), grids_of("mini", sizes)
    picture = ids == MINI["image_token_id"]
    expected, _ = both("mini", torch.float32)[1].get_rope_index(
        ids[None], picture.long()[None], torch.tensor([(1, *grid) for grid in grids])
    )
    assert torch.equal(positions(len(ids), picture.nonzero()[:, 0], sizes), expected[:, 0])
    found, theirs = run("mini", torch.float32, ids, sizes, seen("mini", sizes))
    assert apart(found, theirs) < 1e-5


def test_pictures_do_not_see_each_other() -> None:
    tower = both("flat", torch.float32)[0].visual
    sizes: list[Grid] = [(5, 3), (2, 2), (5, 3)]
    patches, grids = seen("flat", sizes), grids_of("flat", sizes)
    assert patches is not None
    with torch.inference_mode():
        together = tower(patches, grids).split([15, 4, 15])
        parts = patches.split([rows * columns for rows, columns in grids])
        for found, part, grid in zip(together, parts, grids, strict=True):
            assert apart(found, tower(part, [grid])) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_called_as_upstream_calls_them(name: str) -> None:
    with torch.device("meta"):
        ours = TextEncoder(CONFIGS[name])
    shapes = {key: value.shape for key, value in both(name, torch.float32)[1].named_parameters()}
    assert {key: value.shape for key, value in ours.named_parameters()} == shapes
    assert all(value.is_meta for value in ours.parameters())
    assert not list(ours.buffers())


def test_image_tokens_that_are_not_there_are_missed() -> None:
    ours, _ = both("mini", torch.float32)
    sizes: list[Grid] = [(2, 3)]
    with pytest.raises(ModelMismatch, match="1 image tokens where its pictures have 6"):
        ours(prompt("mini", sizes)[:4], seen("mini", sizes), grids_of("mini", sizes))


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """The same in the newer layout."""
    config = copy.deepcopy(config)
    outer = ("vision_config", "image_token_id")
    text = {key: value for key, value in config.items() if key not in outer}
    rope = text.pop("rope_scaling")
    kind = rope.pop("type")
    rope |= {"rope_type": "default" if kind == "mrope" else kind} | rope
    text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta")}
    return {key: config[key] for key in outer} | {"text_config": text}


def test_all_layouts_say_the_same() -> None:
    expected = read_config(FLAT)
    new = nested(FLAT)
    assert read_config(new) == expected
    # As transformers 4.53 wrote both; what is within counts.
    between = FLAT | {"hidden_size": 1, "text_config": FLAT | {"image_token_id": None}}
    assert read_config(between) == expected
    vision = FLAT["vision_config"] | {
        "in_channels": 3,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10_000.0},
    }
    assert read_config(FLAT | {"vision_config": vision}) == expected


@pytest.mark.parametrize("layout", [copy.copy, nested])
@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("text", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("text", {"use_sliding_window": True}, "sliding windows"),
        ("text", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ("text", {"hidden_size": None}, "hidden_size is missing"),
        ("text", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ("text", {"intermediate_size": 0}, "intermediate_size is 0"),
        ("text", {"num_attention_heads": 7}, "do not divide"),
        ("text", {"num_key_value_heads": 4}, "do not divide"),
        ("rope", {"type": "yarn", "factor": 4.0}, "'yarn'"),
        ("rope", {"rope_type": "linear"}, "'linear'"),
        ("rope", {"mrope_section": None}, "mrope_section is missing"),
        ("rope", {"mrope_section": [4, 4]}, "mrope_section"),
        ("rope", {"mrope_section": [2, 3, 4]}, "mrope_section"),
        ("top", {"image_token_id": None}, "image_token_id is missing"),
        ("top", {"vision_config": None}, "no vision_config"),
        ("vision", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
        ("vision", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ("vision", {"patch_size": [4, 4]}, "patch_size is"),
        ("vision", {"window_size": 11}, "window_size"),
        ("vision", {"num_heads": 8}, "heads"),
        ("vision", {"out_hidden_size": 95}, "out_hidden_size"),
        ("vision", {"fullatt_block_indexes": None}, "fullatt_block_indexes is missing"),
    ],
)
def test_what_is_not_implemented_is_refused(
    layout: Any, part: str, change: dict[str, Any], told: str
) -> None:
    config = copy.deepcopy(FLAT)
    rope, vision = config["rope_scaling"], config["vision_config"]
    {"text": config, "top": config, "rope": rope, "vision": vision}[part].update(change)
    with pytest.raises(ModelMismatch) as caught:
        read_config(layout(config))
    assert "text_encoder/config.json" in str(caught.value) and told in str(caught.value)
