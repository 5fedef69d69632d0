"""Files of other programs that a benchmark writes: what serves reads the weights that were put in.

Here of the miniature's, whose rows are too short for K-quants (tests/model/test_gguf.py has them).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.opening import open_checkpoint
from image_worker.model.wide import Wide
from tests.conftest import MINI_FOLDER
from tools.full_size_files import KINDS, Weights, write

# Relative errors of weights: of 3 bits behind the point, of 8 bits, and of int4 in groups of 64
# beside 32 singular vectors; modulation in four bits with an offset, where it is.
LAYERS = ("to_q", "to_v")
ERRORS = {"fp8": 0.04, "Q8_0": 0.01, "nunchaku": 0.15}
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ERRORS)
def test_a_file_holds_the_weights(kind: str, tmp_path: Path) -> None:
    weights = Weights(MINI_FOLDER / "transformer")
    file = write(weights, tmp_path, kind)
    opened = open_checkpoint(file, TransformerConfig.parse(weights.config))
    assert not isinstance(opened, Wide)
    names = [name for name in weights.names("") if weights.is_coded(name)]
    assert len(names) > 80
    for name in names:
        path = name.removesuffix(".weight")
        layer = opened.linear(path, CPU, torch.float32)
        expected = weights[name].float()
        error = (weight_of(layer) - expected).norm() / expected.norm()
        assert error < ERRORS[kind], (name, error)
        bias = weights[f"{path}.bias"].float()
        torch.testing.assert_close(layer.bias.float(), bias, rtol=2e-2, atol=2e-2)


def weight_of(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, CodedLinear):
        found = torch.empty(layer.weight.shape)
        layer.weight.decode(found)
        return found
    scales = layer.scales if isinstance(layer, Fp8Linear) else 1
    return layer.weight.float() * scales


def test_k_quants_are_mixed_as_the_name_says(tmp_path: Path) -> None:
    """Of a model of sixteen blocks, a layer each of those that have more bits and that have not."""
    noise = torch.Generator().manual_seed(0)
    folder, blocks = tmp_path / "transformer", range(16)
    folder.mkdir()
    (folder / "config.json").write_text('{"num_layers": 16}')
    names = [f"transformer_blocks.{n}.attn.{kind}.weight" for n in blocks for kind in LAYERS]
    tensors = {name: torch.randn(2, 256, generator=noise).bfloat16() for name in names}
    save_file(tensors | {"txt_norm.weight": torch.ones(4)}, folder / "x.safetensors")
    read = gguf.GGUFReader(write(Weights(folder), tmp_path, "Q4_K_M"))
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    of_values = [types[f"transformer_blocks.{n}.attn.to_v.weight"] for n in blocks]
    assert of_values == [f"Q{6 if n in (0, 1, 4, 7, 10, 13, 14, 15) else 4}_K" for n in blocks]
    assert {types[name] for name in names if "to_q" in name} == {"Q4_K"}
    assert types["txt_norm.weight"] == "F32"
    for tensor in read.tensors[:-1]:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = tensors[tensor.name].float()
        error = (torch.from_numpy(found) - expected).norm() / expected.norm()
        assert error < (0.03 if "6" in tensor.tensor_type.name else 0.1)


def test_every_kind_is_tried() -> None:
    assert set(KINDS) == {*ERRORS, "Q4_K_M"}, "that one by the test before"
