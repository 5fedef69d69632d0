"""Our own SVDQuant: how near to a weight it comes, and NF4 beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.components import TRANSFORMER
from image_worker.model.formats import format_of, nf4, svdq
from image_worker.model.formats.decomposition import decompose, low_rank
from image_worker.model.packed import slots
from tests.conftest import read_mini

TOLERANCE = 1e-5  # float32, summed in another order


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decoded(layer: Any) -> Tensor:
    found = torch.empty(layer.weight.shape)
    layer.weight.decode(found)
    return found


def rms(inputs: Tensor) -> Tensor:
    return inputs.square().mean(dim=0).sqrt()


def error(form: Any, weight: Tensor, inputs: Tensor | None = None, **options: Any) -> float:
    """Of the stored weight, or of what it makes of inputs, relative."""
    difference = decoded(form.encode(weight, False, torch.bfloat16, **options)) - weight
    if inputs is None:
        return (difference.norm() / weight.norm()).item()
    return ((inputs @ difference.t()).norm() / (inputs @ weight.t()).norm()).item()


@pytest.mark.parametrize("shape", [(384, 512), (200, 256)])
def test_outlying_channels_cost_little(shape: tuple[int, int]) -> None:
    weight = 0.02 * noise(*shape)
    assert error(svdq, weight) <= error(nf4, weight)
    weight[:, 5::128] *= 20
    assert error(svdq, weight) <= 0.5 * error(nf4, weight)


def test_every_layer_of_the_miniature_is_nearer_than_in_nf4() -> None:
    module = read_mini(TRANSFORMER, torch.float32)
    block = module.transformer_blocks[3]
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and "_mod." not in name:
            weight = layer.weight.detach()
            assert error(svdq, weight) <= 0.8 * error(nf4, weight), name


def test_a_higher_rank_is_nearer() -> None:
    weight = noise(300, 512)
    found = [error(svdq, weight, rank=rank) for rank in (1, 32, 128)]
    assert found == sorted(found, reverse=True)


def test_smoothing_by_ranges_is_nearer_for_such_inputs() -> None:
    weight = 0.02 * noise(256, 512)
    inputs = noise(1000, 512)
    inputs[:, ::40] *= 30
    ranges = rms(inputs)
    assert error(svdq, weight, inputs, ranges=ranges) <= 0.5 * error(svdq, weight, inputs)
    assert error(svdq, weight, inputs) <= 1.05 * error(nf4, weight, inputs)


def test_ranges_help_where_few_channels_are_large() -> None:
    """Four, 20 times as large as the others; measured: 0.62 and 0.45."""
    weight, inputs = 0.02 * noise(256, 1024), noise(1000, 1024)
    inputs[:, [5, 100, 600, 999]] *= 20
    found = error(svdq, weight, inputs, ranges=rms(inputs))
    assert found <= 0.7 * error(svdq, weight, inputs)
    assert found <= 0.55 * error(nf4, weight, inputs)


def test_ranges_are_mean_squares_and_not_the_largest_values() -> None:
    """Of which a single input may be; measured: 0.86."""
    weight, inputs = 0.02 * noise(256, 1024), noise(1000, 1024)
    inputs[:, [5, 100, 600, 999]] *= 20
    inputs.view(-1)[:: 1024 * 9 + 7] *= 20
    largest = error(svdq, weight, inputs, ranges=inputs.abs().amax(dim=0))
    assert error(svdq, weight, inputs, ranges=rms(inputs)) <= 0.95 * largest


@pytest.mark.parametrize("ranges", [torch.zeros(64), torch.full((64,), 3.0)])
def test_ranges_that_say_nothing_cost_nothing(ranges: Tensor) -> None:
    """Of a layer that saw no input, or channels of one size: no smoothing is found."""
    weight = noise(40, 64)
    found = error(svdq, weight, rank=8, ranges=ranges)
    assert found <= 1.001 * error(svdq, weight, rank=8)
    assert not decoded(svdq.encode(torch.zeros(8, 64), False, torch.bfloat16, ranges=ranges)).any()


def test_layers_fitted_to_different_ranges_are_decoded_as_one() -> None:
    """Those that read the same input are multiplied at once, each smoothed in its own way."""
    first, second = (
        svdq.encode(0.02 * noise(64, 128), False, torch.bfloat16, ranges=ranges)
        for ranges in (noise(128).abs(), noise(128).flip(0).abs())
    )
    whole: Any = nn.Module()
    whole.weight = svdq.SvdqWeight.stacked([first.weight, second.weight])  # type: ignore[list-item]
    assert not torch.equal(*whole.weight.inverse)
    assert torch.equal(decoded(whole), torch.cat([decoded(first), decoded(second)]))


def test_the_error_is_what_it_says() -> None:
    weight, ranges = noise(40, 128), noise(128).abs()
    ranges[7] = 0  # a channel that no input has
    for given in (None, ranges):
        found = decompose(weight, 16, given)
        layer = svdq.SvdqWeight(
            found.codes, found.scales, found.inverse[None], found.down[None], found.up
        )
        whole = torch.empty(40, 128)
        layer.decode(whole)
        limit = 0 if given is None else 1e-3 * given.max().item()
        importance = torch.ones(128) if given is None else given.clamp(min=limit)
        difference = (whole - weight) * importance
        assert found.error == pytest.approx(difference.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("large", [True, False])
def test_the_low_rank_part_is_the_nearest(large: bool) -> None:
    """Of a matrix of which no more than that is above the noise."""
    rows, columns = (400, 600) if large else (40, 600)
    whole = noise(rows, 8) @ noise(8, columns)
    up, down = low_rank(whole + 1e-6, 8)
    assert up.shape == (rows, 8) and down.shape == (8, columns)
    assert ((up @ down - whole).norm() / whole.norm()).item() <= TOLERANCE
    torch.manual_seed(5)
    again = low_rank(whole + 1e-6, 8)
    assert torch.equal(up, again[0]) and torch.equal(down, again[1])


def test_zeros_stay_zeros() -> None:
    weight = noise(8, 192)
    weight[2] = 0
    weight[:, 64:128] = 0
    found = decoded(svdq.encode(weight, False, torch.bfloat16, rank=2))
    assert found.isfinite().all()
    assert not decoded(svdq.encode(torch.zeros(8, 64), False, torch.bfloat16)).any()


@pytest.mark.parametrize("rank", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1024, 512), (48, 64), (16, 128)])
def test_an_empty_layer_is_the_same_without_tensors(shape: tuple[int, int], rank: int) -> None:
    form = format_of("svdq", rank)
    assert form
    layer = form.encode(noise(*shape).bfloat16(), False, torch.bfloat16)
    made = form.empty(*shape, False, torch.bfloat16)
    facts = [
        [(slot.name, slot.tensor.dtype, slot.tensor.shape) for slot in slots(one)]
        for one in (layer, made)
    ]
    assert facts[0] == facts[1]
    assert all(slot.tensor.is_meta for slot in slots(made))
    assert sum(slot.tensor.nbytes for slot in slots(layer)) == form.size(*shape)


def test_rows_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ModelMismatch, match="multiple of 64 weights, not of 96"):
        svdq.encode(torch.randn(64, 96), False, torch.float32)
