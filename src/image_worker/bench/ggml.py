"""Weights in three of ggml's types, made on the card, and diffusers' layers for them: to measure.

Scales come from each block's extremes, as in llama.cpp's quantisers without their search: a little
larger errors, equal times.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.gguf import GgufWeight

TYPES = ("Q8_0", "Q6_K", "Q4_K")
KINDS = ("Q8_0", "Q4_K", "Q4_K_M")  # of files
_LARGEST = 63  # of a scale in 6 bits
_MORE_BITS = ("to_v", "add_v_proj", "mlp.net.2")  # what Q4_K_M has half of in Q6_K


def type_of(kind: str, path: str, blocks: int = 60) -> str:
    """Of the layer `path` in a file of that kind, of a model of so many blocks.

    Q4_K_M by llama.cpp's rule: values and the MLPs' second layers have more bits in the first and
    the last eighth of the blocks, and in every third between.
    """
    if kind != "Q4_K_M":
        return kind
    number = int(path.split(".")[1])
    outside = number < blocks // 8 or number >= 7 * blocks // 8
    chosen = outside or (number - blocks // 8) % 3 == 2
    return "Q6_K" if chosen and path.endswith(_MORE_BITS) else "Q4_K"


def encode(weight: Tensor, kind: str) -> CodedLinear:
    """A layer of ours that holds `weight` (out, in) in one of `TYPES`, without a bias."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = weight.float().view(-1, values)
    coded = {"Q8_0": _q8_0, "Q6_K": _q6_k, "Q4_K": _q4_k}[kind](blocks)
    return CodedLinear(GgufWeight(coded.view(len(weight), -1), kind, (values, size)))


def use_diffusers(module: nn.Module, dtype: torch.dtype) -> None:
    """Its layers of ours become diffusers', which share their tensors and compute in `dtype`."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, CodedLinear) and isinstance(layer.weight, GgufWeight):
            with torch.device("meta"):
                made = GGUFLinear(layer.in_features, layer.out_features, True, dtype)
            kind = GGMLQuantizationType[layer.weight.tensor_type]
            made.weight = GGUFParameter(layer.weight.data, quant_type=kind)
            made.bias = layer.bias
            module.set_submodule(name, made)


def _q8_0(blocks: Tensor) -> Tensor:
    """(N, 32) to (N, 34) uint8: a scale, then 32 signed values."""
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)


def _q6_k(blocks: Tensor) -> Tensor:
    """(N, 256) to (N, 210) uint8: codes' lower and upper bits, scales in 8 bits, their scale."""
    parts = blocks.view(len(blocks), 16, 16)
    step = parts.abs().amax(2) / 31
    scale = (step.amax(1, keepdim=True) / 127).half()
    scales = _nearest(step, scale, 127)
    codes = (parts / (scale.float() * scales).clamp(min=1e-8)[:, :, None]).round().clamp(-32, 31)
    values = (codes + 32).to(torch.uint8).view(len(blocks), 2, 4, 32)
    low = values[:, :, :2] & 15 | (values[:, :, 2:] & 15) << 4
    high = values[:, :, 0] >> 4
    for number in (1, 2, 3):
        high = high | values[:, :, number] >> 4 << 2 * number
    return torch.cat([low.flatten(1), high.flatten(1), scales, scale.view(torch.uint8)], dim=1)


def _q4_k(blocks: Tensor) -> Tensor:
    """(N, 256) to (N, 144) uint8: scales of scales and of minima, these in 6 bits, then values."""
    parts = blocks.view(len(blocks), 8, 32)
    low = parts.amin(2).clamp(max=0)
    step = (parts.amax(2) - low) / 15
    scale, minimum = ((x.amax(1, keepdim=True) / _LARGEST).half() for x in (step, -low))
    scales, minima = _nearest(step, scale, _LARGEST), _nearest(-low, minimum, _LARGEST)
    width = (scale.float() * scales)[:, :, None]
    codes = _nearest(parts + (minimum.float() * minima)[:, :, None], width, 15)
    pairs = codes.view(len(blocks), 4, 2, 32)
    packed = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat(
        [
            scale.view(torch.uint8),
            minimum.view(torch.uint8),
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            minima[:, :4] | minima[:, 4:] >> 4 << 6,
            scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
            packed.flatten(1),
        ],
        dim=1,
    )


def _nearest(values: Tensor, by: Any, most: int) -> Tensor:
    """Whole numbers from 0 to `most`, uint8."""
    found: Tensor = (values / by.float().clamp(min=1e-8)).round().clamp(0, most)
    return found.to(torch.uint8)
