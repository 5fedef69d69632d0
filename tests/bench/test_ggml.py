"""The benchmark's weights in ggml's types are what the `gguf` package says that they are."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import nn

from image_worker.bench import ggml


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.008), ("Q6_K", 0.03), ("Q4_K", 0.09)])
def test_they_stand_for_the_weights(kind: str, error: float) -> None:
    weight = torch.randn(48, 512)
    layer = ggml.encode(weight, kind)
    found = torch.empty(layer.weight.shape)
    layer.weight.decode(found)
    assert (found - weight).norm() / weight.norm() < error
    named = dequantize(layer.weight.data.numpy(), GGMLQuantizationType[kind])
    assert torch.equal(found, torch.from_numpy(named))


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_diffusers_layers_compute_with_the_same(kind: str) -> None:
    layer = ggml.encode(torch.randn(64, 256), kind)
    layer.bias = nn.Parameter(torch.randn(64))
    model = nn.Sequential(layer)
    x = torch.randn(5, 256)
    expected = model(x)
    ggml.use_diffusers(model, torch.float32)
    assert type(model[0]).__name__ == "GGUFLinear"
    # It decodes in float16.
    torch.testing.assert_close(model(x), expected, rtol=0.01, atol=0.1)


def test_a_file_has_more_bits_for_some_layers() -> None:
    found = [
        ggml.type_of("Q4_K_M", f"transformer_blocks.{number}.attn.to_v") for number in range(60)
    ]
    assert found.count("Q6_K") == 30
    assert ggml.type_of("Q4_K_M", "transformer_blocks.0.attn.to_q") == "Q4_K"
    assert ggml.type_of("Q8_0", "transformer_blocks.0.attn.to_v") == "Q8_0"
