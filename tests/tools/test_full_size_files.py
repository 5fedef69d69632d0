"""Files of other programs that a benchmark writes: what serves reads the weights that were put in.

Here of the miniature's, whose rows are too short for K-quants (tests/model/test_gguf.py has them).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.opening import open_checkpoint
from image_worker.model.plain import Plain
from tests.conftest import MINI_FOLDER
from tools.full_size_files import KINDS, Weights, write

# Relative errors of weights: of 3 bits behind the point, of 8 bits, and of int4 in groups of 64
# beside 32 singular vectors; modulation in four bits with an offset, where it is.
ERRORS = {"fp8": 0.04, "Q8_0": 0.01, "nunchaku": 0.15}
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ERRORS)
def test_a_file_holds_the_weights(kind: str, tmp_path: Path) -> None:
    weights = Weights(MINI_FOLDER / "transformer")
    file = write(weights, tmp_path, kind)
    opened = open_checkpoint(file, TransformerConfig.parse(weights.config))
    assert not isinstance(opened, Plain)
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


def test_every_kind_is_tried() -> None:
    assert set(KINDS) == {*ERRORS, "Q4_K_M"}
