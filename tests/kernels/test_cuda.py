"""What kernels in CUDA's own language are given."""

from __future__ import annotations

import pytest
import torch

from image_worker.kernels.cuda import _argument


def test_arguments_are_addresses_and_numbers_of_32_bits() -> None:
    tensor = torch.zeros(4, 4)
    assert _argument(tensor) == tensor.data_ptr()
    assert (_argument(-3).value, _argument(0.5).value) == (-3, 0.5)
    with pytest.raises(ValueError, match="contiguous"):
        _argument(tensor[:, :2])
