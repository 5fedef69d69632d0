"""SVDQuant on a card, at full size: the kernel against its definition; what encoding takes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from image_worker.kernels import fused, reference
from image_worker.kernels.reference import FP8, LEAST_AMAX
from image_worker.model.formats import nf4, svdq
from image_worker.model.formats.svdq import SvdqWeight

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")
FP8_STEP = 2**-3  # between neighbours, relative to the smaller
LONGEST = 0.2  # seconds for a layer, of 720
# Layers, rows and columns of products of the full model.
SHAPES = [(6, 3072, 3072), (2, 12288, 3072), (2, 3072, 12288)]


def random_weight(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> SvdqWeight:
    layers, rows, columns = shape
    generator = torch.Generator(CARD).manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=CARD)

    codes = torch.randint(
        256, (layers * rows, columns // 2), generator=generator, device=CARD, dtype=torch.uint8
    )
    scales = noise(layers * rows, columns // 64).abs().to(dtype)
    down, up = noise(layers, rank, columns).to(dtype), noise(layers * rows, rank).to(dtype)
    return SvdqWeight(codes, scales, (0.3 * noise(layers, columns)).exp(), down, up)


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float16, FP8, torch.int8])
@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_decodes_as_its_definition(
    shape: tuple[int, int, int], rank: int, into: torch.dtype
) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) or (into == FP8 and capability < (8, 9)):
        pytest.skip("for newer cards")
    weight = random_weight(shape, rank, torch.bfloat16)
    row_scales = None
    if into in (FP8, torch.int8):
        row_scales = weight.largest().clamp_(min=LEAST_AMAX) / reference.LARGEST[into]
    found, expected = (torch.empty(weight.shape, dtype=into, device=CARD) for _ in range(2))
    fused.decode_svdq(weight, found, row_scales)
    reference.decode_svdq(weight, expected, row_scales)
    if row_scales is None:
        step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[into]
        torch.testing.assert_close(found, expected, rtol=step, atol=1e-4)
        return
    values, others = found.float(), expected.float()
    limit = FP8_STEP * others.abs() + 2**-9 if into == FP8 else torch.ones_like(others)
    assert ((values - others).abs() <= limit).all()
    assert (values != others).float().mean() < 1e-3


def test_encoding_takes_a_fifth_of_a_second_and_is_nearer_than_nf4() -> None:
    weight = torch.randn(3072, 12288, device=CARD) * 0.02
    weight[:, ::700] *= 20
    errors = []
    for form in (svdq, nf4):
        for _ in range(2):  # the first one makes libraries ready
            torch.cuda.synchronize()
            start = time.perf_counter()
            layer: Any = form.encode(weight.bfloat16(), False, torch.bfloat16)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        if form is svdq:
            assert seconds <= LONGEST
        whole = torch.empty(weight.shape, device=CARD)
        layer.weight.decode(whole)
        errors.append(((whole - weight).norm() / weight.norm()).item())
    assert errors[0] <= 0.8 * errors[1]
