"""A transformer's configuration by its tensors' shapes, and shapes by its configuration.

For files without a configuration, whose tensors have diffusers' names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import nn

from image_worker.errors import ModelMismatch
from image_worker.model.configs import TransformerConfig
from image_worker.model.skeleton import Skeleton

Shapes = Mapping[str, tuple[int, ...]]
BLOCK = re.compile(r"transformer_blocks\.(0|[1-9]\d{0,5})\.(.+)")
_AXES = {128: (16, 56, 56)}  # by head: of all published models
_WIDEST = 1 << 20  # of any tensor; the full model's widest has 18432 rows


def config_of(shapes: Shapes, *, zero_cond_t: bool, label: str) -> TransformerConfig:
    """Of the model that has these tensors. label: the file's name, for messages.

    Shapes say nothing of how positions turn a head's numbers: heads must be of 128, as in all
    published models.

    Raises:
        ModelMismatch: these are of no such model.
    """
    width, channels = _sizes(shapes, "img_in.weight", 2, label)
    _, joint = _sizes(shapes, "txt_in.weight", 2, label)
    (head,) = _sizes(shapes, "transformer_blocks.0.attn.norm_q.weight", 1, label)
    if head not in _AXES or width % head:
        raise ModelMismatch(
            f"{label}: its model has heads of {head} in a width of {width}; without a "
            f"configuration this worker knows heads of {', '.join(map(str, _AXES))} only"
        )
    numbers = {match[1] for match in map(BLOCK.fullmatch, shapes) if match}
    return TransformerConfig(
        num_layers=len(numbers),
        num_attention_heads=width // head,
        attention_head_dim=head,
        joint_attention_dim=joint,
        in_channels=channels,
        axes_dims_rope=_AXES[head],
        zero_cond_t=zero_cond_t,
    )


def expected(config: TransformerConfig) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Paths of the model's linear layers, and shapes of all its tensors.

    Its first block stands for all, so that a file that counts many costs names only.
    """
    with torch.device("meta"):
        model = Skeleton(dataclasses.replace(config, num_layers=1))
    paths = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    count = config.num_layers
    linears = {name for path in paths for name in _in_each_block(path, count)}
    return linears, {
        name: shape for first, shape in shapes.items() for name in _in_each_block(first, count)
    }


def _in_each_block(name: str, blocks: int) -> list[str]:
    """The names that stand for that of the first block; any other name as it is."""
    match = BLOCK.fullmatch(name)
    if match is None:
        return [name]
    return [f"transformer_blocks.{number}.{match[2]}" for number in range(blocks)]


def _sizes(shapes: Shapes, name: str, dimensions: int, label: str) -> tuple[int, ...]:
    """A tensor's shape, from which others' follow."""
    if name not in shapes:
        raise ModelMismatch(f"{label} is of no Qwen-Image transformer: it lacks {name}")
    shape = shapes[name]
    if len(shape) != dimensions or not all(0 < size <= _WIDEST for size in shape):
        raise ModelMismatch(f"{label}: {name} is {shape}, as in no Qwen-Image transformer")
    return shape
