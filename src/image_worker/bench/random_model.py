"""The transformer's true architecture with random weights, made on the card: no files are needed.

Weights are the same every time and in every precision. Activations keep one size through all
sixty blocks, so that errors of rounding are of the size that a real model's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from image_worker.bench import ggml
from image_worker.model.formats import format_of
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.transformer import Row
from image_worker.settings import Precision

PROMPT_TOKENS = 256
OUTLIERS, OUTLIER_SIZE = 4, 20.0  # channels of each kind, and how much larger than the others
CARD = torch.device("cuda")
Outliers = Literal["inputs", "weights"]
# In which the blocks' weights can be stored: ours, other ranks and kinds of svdq, files' formats.
KINDS = (*get_args(Precision), "svdq-r128", "svdq-ranges", "fp8-file", *ggml.KINDS)


def random_model(
    kind: str = "bf16",
    *,
    outliers: Outliers | None = None,
    modulation: torch.device = CARD,
    shared: Any = None,
    ranges: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """diffusers' module, 20 B parameters in bf16 or what `kind` makes of the blocks' layers.

    Made block by block, so that no more of it is in bf16 than has to be. outliers: see
    `plant_outliers`; modulation: where the layers are that read timesteps only, a third of all;
    shared: a module whose layers of that kind are taken instead; ranges: of inputs, for svdq.
    """
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    model.to_empty(device=CARD)
    _fill(model, seed=0)
    for number, block in enumerate(blocks):
        block.to_empty(device=CARD)
        _fill(block, seed=1 + number)
        if outliers:
            plant_outliers(block, outliers)
        quantise(block, kind, prefix=f"transformer_blocks.{number}", ranges=ranges)
        for name in ("img_mod", "txt_mod"):
            if shared is not None:
                setattr(block, name, getattr(shared.transformer_blocks[number], name))
            getattr(block, name).to(modulation)
    model.transformer_blocks = blocks
    rope = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    model.pos_embed = rope  # its tables are plain tensors, which to_empty leaves on meta
    return model


def _fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator(CARD).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        if "_mod." in name:
            parameter.mul_(0.3)  # so that activations stay of one size


def plant_outliers(block: Any, kind: Outliers) -> None:
    """Makes some channels 20 times as large as the others: of what is multiplied, or of weights.

    inputs: of every activation that is rounded: what the first products of both halves of a block
    read, the MLPs' hidden values, and each head's values; of its queries and keys √20 times each,
    so that their product is 20 times. weights: columns of every layer that is rounded, which are
    what numbers beside them in a group lose their precision to.
    """
    if kind == "weights":
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and "_mod." not in name:
                step = layer.in_features // OUTLIERS
                layer.weight[:, step // 2 :: step] *= OUTLIER_SIZE
        return
    width, head = block.attn.to_q.in_features, block.attn.norm_q.weight.numel()
    for modulation in (block.img_mod[1], block.txt_mod[1]):
        for scale in (1, 4):
            start = scale * width
            modulation.bias[start : start + OUTLIERS] = OUTLIER_SIZE - 1
    for mlp in (block.img_mlp, block.txt_mlp):
        mlp.net[0].proj.weight[:OUTLIERS] *= OUTLIER_SIZE
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        getattr(block.attn, norm).weight[:1] = OUTLIER_SIZE**0.5
    for values in (block.attn.to_v, block.attn.add_v_proj):
        values.weight.view(-1, head, width)[:, 1] *= OUTLIER_SIZE


def quantise(
    blocks: nn.Module,
    kind: str,
    *,
    prefix: str = "transformer_blocks",
    ranges: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The layers that are stored in few bits become what `kind` makes of them, in place.

    kind: of `KINDS`; prefix: of `blocks` in the model's names; ranges: of inputs, for svdq.
    """
    if kind == "bf16":
        return
    for name, layer in list(blocks.named_modules()):
        if isinstance(layer, nn.Linear) and "_mod." not in name:
            path = f"{prefix}.{name}"
            found = _encoded(layer.weight.data, kind, path, ranges[path] if ranges else None)
            found.bias = layer.bias
            blocks.set_submodule(name, found)


def _encoded(weight: torch.Tensor, kind: str, path: str, ranges: torch.Tensor | None) -> Any:
    if kind in ggml.KINDS:
        return ggml.encode(weight, ggml.type_of(kind, path))
    if kind == "fp8-file":
        return _as_in_a_file(weight)
    if kind in ("svdq-r128", "svdq-ranges"):
        form = format_of("svdq", 128 if kind == "svdq-r128" else 32, ranges)
    else:
        form = format_of(cast("Precision", kind))
    assert form is not None
    return form.encode(weight, True, torch.bfloat16)


def _as_in_a_file(weight: torch.Tensor) -> Fp8Linear:
    """In FP8 with one scale for all, as ComfyUI's files have it, as it serves."""
    scale = weight.float().abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    values = (weight.float() / scale).to(torch.float8_e4m3fn)
    return Fp8Linear(values, scale.expand(len(weight), 1).contiguous())


def random_row(side: int, references: int, text: int = PROMPT_TOKENS, seed: int = 1) -> Row:
    """A square result with references of a megapixel each."""
    generator = torch.Generator(CARD).manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=CARD, dtype=torch.bfloat16)

    shapes = ((1, side // 16, side // 16), *((1, 64, 64),) * references)
    tokens = sum(height * width for _, height, width in shapes)
    return Row(noise(tokens, 64), shapes, noise(text, 3584), 0.75)
