"""The transformer's parameters are called and shaped as diffusers'; what differs is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from image_worker.errors import ModelMismatch
from image_worker.model.components import TRANSFORMER
from image_worker.model.configs import TransformerConfig
from image_worker.model.in_folder import read_json
from image_worker.model.skeleton import Skeleton
from image_worker.model.transformer import Row, Transformer, velocities
from tests import upstream
from tests.conftest import MINI_FOLDER

PUBLISHED: dict[str, Any] = {  # Qwen-Image's own file; later ones are without the last option
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
# Where the miniature has two numbers that are equal, these differ.
SMALL = TransformerConfig(
    num_layers=2,
    num_attention_heads=3,
    attention_head_dim=16,
    joint_attention_dim=40,
    in_channels=32,
    axes_dims_rope=(4, 8, 4),
    zero_cond_t=True,
)


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        read_json(MINI_FOLDER / "transformer" / "config.json"),
        upstream.options(SMALL),
    ],
)
def test_names_and_shapes_are_diffusers(config: dict[str, Any]) -> None:
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    config["num_layers"] = min(config["num_layers"], 3)
    known = {name: value for name, value in config.items() if name != "pooled_projection_dim"}
    with torch.device("meta"):
        expected = QwenImageTransformer2DModel(**known)
        found = Skeleton(TransformerConfig.parse(config))
    assert shapes(found) == shapes(expected)
    assert not list(found.buffers())


def test_all_of_it_is_on_the_meta_device() -> None:
    module = TRANSFORMER.empty(MINI_FOLDER / "transformer")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@torch.inference_mode()
def test_what_is_made_of_it_computes_as_diffusers_module() -> None:
    """And what is made of that module, as benchmarks make it."""
    torch.manual_seed(0)
    source = Skeleton(SMALL)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stock = upstream.transformer(source)
    grids = ((1, 3, 4), (1, 5, 2))
    row = Row(torch.randn(22, 32), grids, torch.randn(7, 40), 0.6)
    expected = upstream.velocity(stock, row)
    assert expected.std() > 0.1
    for given in (source, stock):
        served = Transformer(given, torch.device("cpu"), torch.float32, round_to=None).eval()
        [found] = velocities(served, [row])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_published_configuration_is_understood() -> None:
    config = TransformerConfig.parse(PUBLISHED)
    assert (config.width, config.zero_cond_t, config.axes_dims_rope) == (3072, False, (16, 56, 56))
    assert TransformerConfig.parse(PUBLISHED | {"zero_cond_t": True}).zero_cond_t


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"guidance_embeds": True}, "guidance_embeds of the transformer is True; this worker runs"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope"),
        ({"patch_size": 1}, "patch_size of the transformer is 1"),
        ({"out_channels": None}, "out_channels of the transformer is None"),
        ({"in_channels": 68}, "out_channels of the transformer is 16; this worker runs 17"),
        ({"axes_dims_rope": [16, 56]}, "configuration is damaged"),
        ({"axes_dims_rope": [16, 56, 54]}, "axes_dims_rope"),
        ({"axes_dims_rope": [16, 55, 57]}, "axes_dims_rope"),
        ({"num_layers": None}, "configuration is damaged"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelMismatch, match=complaint):
        TransformerConfig.parse(PUBLISHED | change)


def test_an_option_that_is_missing_is_named() -> None:
    config = {name: value for name, value in PUBLISHED.items() if name != "num_layers"}
    with pytest.raises(ModelMismatch, match="num_layers"):
        TransformerConfig.parse(config)
