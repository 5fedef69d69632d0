"""Weights in two of ggml's types, made on the card, and diffusers' own layers for them: to measure.

The types are Q8_0 and Q4_K, which most layers of a Q4_K_M file have. Scales come from each block's
extremes, as in llama.cpp's quantisers without their search: a little larger errors, equal times.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.gguf import GgufWeight

KINDS = ("Q8_0", "Q4_K")
_LARGEST = 63  # of a scale in 6 bits


def encode(weight: Tensor, kind: str) -> CodedLinear:
    """A layer of ours that holds `weight` (out, in), without a bias."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = weight.float().view(-1, values)
    coded = _q8_0(blocks) if kind == "Q8_0" else _q4_k(blocks)
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
