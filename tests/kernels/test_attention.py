"""Attention in int8: what it reads, what it computes, and how far that is from exact attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from image_worker.kernels import attention, fused, reference
from image_worker.kernels.attention_reference import TASK, TILE, attend_int8
from image_worker.kernels.reference import FP8, Activation, Quantised
from image_worker.model.attention import Exact, Int8, Order, attend
from tests.kernels.test_fused import DEVICE, noise, with_carries

HEADS = 3
LENGTHS = {"one": [300], "whole tiles": [256], "several": [130, 1, 70]}
ROWS_OF_KEYS = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]  # of each sixteen
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is for Hopper",
)


def given(lengths: list[int], size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Order, int]:
    """qkv, norms, order and how many tokens are text: in stream order a few of each row."""
    tokens, text_tokens = sum(lengths), len(lengths)
    qkv = noise(tokens, 3 * HEADS * size, dtype=dtype)
    qkv[:, -size:] *= 20  # one head's values, and a channel of keys, are far larger
    qkv[:, HEADS * size + 3] *= 20
    norms = 1 + noise(2, 2, size, dtype=dtype, seed=1) / 4
    angles = noise(tokens, size // 2, seed=2).cpu()
    rope = torch.polar(torch.ones_like(angles), angles)
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    others = [place for place in range(tokens) if place not in starts]
    targets = [(length // 3, length - length // 2) for length in lengths]
    order = Order.of(lengths, targets, torch.tensor(starts + others), rope, torch.device(DEVICE))
    return qkv, norms, order, text_tokens


def unswizzled(tiles: Tensor) -> Tensor:
    """(rows, 128), each row's pieces in order."""
    pieces = tiles.view(-1, 8, 16)
    places = torch.arange(8, device=tiles.device) ^ (
        torch.arange(len(pieces), device=tiles.device) % 8
    ).view(-1, 1)
    return pieces.gather(1, places[:, :, None].expand(-1, -1, 16)).view(-1, 128)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_tiles_hold_what_the_reference_rounds(lengths: list[int], size: int) -> None:
    qkv, norms, order, text_tokens = given(lengths, size, torch.bfloat16)
    tiles = attention.Attend().to_tiles(qkv, norms, order.rope, order.owners, text_tokens)
    owners = order.owners.long()
    places, there = len(owners), owners >= 0
    assert places % TILE == 0 and int(there.sum()) == len(qkv)
    count = HEADS * places
    q, k, v = (
        part[order.places][owners.clamp(min=0)].transpose(0, 1)  # (heads, places, size)
        for part in reference.to_joint_heads(
            qkv.float(), norms.float(), order.rope, order.places, text_tokens
        )
    )

    queries = unswizzled(tiles.queries[:count]).view(torch.int8).view(HEADS, places, 128).float()
    scales = tiles.query_scales[:count].view(HEADS, places, 1) * math.sqrt(size) / math.log2(math.e)
    assert (queries.abs().amax(-1) == 127)[:, there].all()
    assert not queries[:, ~there].any() and not queries[..., size:].any()
    assert ((queries * scales)[..., :size] - q)[:, there].abs().le(0.501 * scales[:, there]).all()

    stored = unswizzled(tiles.keys[:count]).view(torch.int8).view(HEADS, -1, 16, 128).float()
    keys = torch.empty_like(stored)
    keys[:, :, ROWS_OF_KEYS] = stored
    keys = keys.view(HEADS, -1, TILE, 128)
    scales = tiles.scales[..., 0, None, None]
    error = (keys * scales).view(HEADS, places, 128)[..., :size] - k
    assert (keys.abs().amax((2, 3)) == 127).all()
    assert not keys.view(HEADS, places, 128)[:, ~there].any()
    limit = (0.501 * scales).expand(-1, -1, TILE, 1).reshape(HEADS, places, 1)
    assert error[:, there].abs().le(limit[:, there]).all()

    bytes_of_values = unswizzled(tiles.values[:count]).view(FP8).view(HEADS, -1, 128, TILE)
    scales = tiles.scales[..., 1, None, None].exp2()
    wanted = torch.where(there[:, None], v, 0).view(HEADS, -1, TILE, size) / scales
    wanted = wanted.to(FP8).transpose(2, 3)
    values = with_carries(bytes_of_values[:, :, :size], wanted)
    assert (values == wanted.float()).float().mean() > 0.99
    assert not bytes_of_values[:, :, size:].float().any()


@pytest.mark.parametrize("sharpness", [1, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_reference_is_near_exact_attention(lengths: list[int], sharpness: int) -> None:
    q, k, v = (noise(sum(lengths), HEADS, 64, seed=seed) for seed in range(3))
    exact = attend(sharpness * q, k, v, lengths, lengths)
    found = attend_int8(sharpness * q, k, v, lengths)
    assert ((found - exact).norm() / exact.norm()).item() <= 0.045  # FP8 has four bits of a number


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 0])
def test_a_tile_of_small_values_keeps_its_share_of_the_softmax(scale: float) -> None:
    q, k, v = (noise(2 * TILE, HEADS, 64, seed=seed) for seed in range(3))
    v[TILE:] *= scale
    exact = attend(q, k, v, [2 * TILE], [2 * TILE])
    found = attend_int8(q, k, v, [2 * TILE])
    assert ((found - exact).norm() / exact.norm()).item() <= 0.045


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_broken_number_is_not_lost_in_tiles(part: int) -> None:
    qkv, norms, order, text_tokens = given([256], 32, torch.bfloat16)
    spoil(qkv, order, part)
    tiles = attention.Attend().to_tiles(qkv, norms, order.rope, order.owners, text_tokens)
    if part == 0:
        broken = tiles.query_scales[: HEADS * 256].view(HEADS, 256).isnan()
        assert broken.sum() == 1 and broken[1, 5]
    else:
        broken = tiles.scales[..., part - 1].isnan()
        assert broken.sum() == 1 and broken[1, 0]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_broken_number_is_not_lost_in_the_reference(part: int) -> None:
    qkv, norms, order, text_tokens = given([256], 32, torch.float32)
    spoil(qkv, order, part)
    parts = reference.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
    assert attend_int8(*parts, order.lengths).isnan().any()


def spoil(qkv: Tensor, order: Order, part: int) -> None:
    """Breaks one number of the second head's queries, keys or values: of the sixth token."""
    qkv[order.owners[5].item(), part * HEADS * 32 + 40] = float("nan")


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("round_to", [None, FP8, torch.int8])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_of_targets_only_it_is_the_same(
    lengths: list[int], round_to: torch.dtype | None, int8: bool
) -> None:
    if int8 and DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("attention in int8 is for Hopper")
    qkv, norms, order, text_tokens = given(lengths, 32, torch.bfloat16)
    # The kernels that these share are tested by themselves; Triton's interpreter is slow.
    ops = fused if DEVICE == "cuda" else reference
    attention = Int8(torch.device(DEVICE)) if int8 else Exact(ops)
    everything, targets = (
        attention(qkv, norms, order, text_tokens, round_to=round_to, only_targets=only)
        for only in (False, True)
    )
    wanted = widened(everything)[order.targets]
    assert len(order.targets) == sum(order.target_counts)
    assert (widened(targets) - wanted).norm() / wanted.norm() <= 1e-2


def widened(found: Activation) -> Tensor:
    if isinstance(found, Quantised):
        return found.values.float() * found.scales
    return found.float()


def test_a_rows_neighbours_do_not_matter_to_the_reference() -> None:
    q, k, v = (noise(200, HEADS, 64, seed=seed) for seed in range(3))
    alone = attend_int8(q[130:], k[130:], v[130:], [70])
    together = attend_int8(q, k, v, [130, 70])
    torch.testing.assert_close(together[130:], alone, rtol=1e-5, atol=1e-6)


def test_a_row_of_equal_tokens_is_their_value() -> None:
    value = noise(HEADS, 64)
    q = torch.zeros(150, HEADS, 64, device=DEVICE)
    found = attend_int8(q, q, value.expand(150, -1, -1), [150])
    torch.testing.assert_close(found, value.flatten().expand(150, -1), rtol=2**-4, atol=0.02)


def test_orders_cover_each_token_once() -> None:
    lengths = [130, 1, 400]
    _, _, order, _ = given(lengths, 32, torch.float32)
    owners, tasks = order.owners.tolist(), order.tasks.tolist()
    assert sorted(owner for owner in owners if owner >= 0) == list(range(sum(lengths)))
    joint = [owner for owner in owners if owner >= 0]
    assert [order.places[owner].item() for owner in joint] == list(range(sum(lengths)))
    covered = [
        place for start, _, last, _ in tasks for place in range(start, min(start + TASK, last))
    ]
    assert sorted(covered) == [place for place, owner in enumerate(owners) if owner >= 0]
    targets = set(order.targets.tolist())
    reached = {
        owners[place]
        for start, _, last, _ in order.target_tasks.tolist()
        for place in range(start, min(start + TASK, last))
    }
    assert len(targets) == 65 + 1 + 200 and targets <= reached
    for start, first, last, _ in order.target_tasks.tolist():
        assert start % 8 == 0 and first <= start < last
    # Rows of 130, 1 and 400 tokens begin at multiples of 128.
    assert {(first, last) for _, first, last, _ in tasks} == {(0, 130), (256, 257), (384, 784)}
    assert all(first <= start < last for start, first, last, _ in tasks)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize(
    "lengths", [*LENGTHS.values(), [1280, 1281, 64], [8449]], ids=lambda lengths: str(sum(lengths))
)
def test_the_kernel_computes_what_the_reference_does(lengths: list[int], size: int) -> None:
    qkv, norms, order, text_tokens = given(lengths, size, torch.bfloat16)
    norms = norms * 2  # sharp: a few keys have most of the weight
    kernels = attention.Attend()
    tiles = kernels.to_tiles(qkv, norms, order.rope, order.owners, text_tokens)
    found = kernels(tiles, order.tasks, order.owners, len(qkv), size).float()
    q, k, v = fused.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
    exact = attend(q, k, v, order.lengths, order.lengths)[order.places].float()
    expected = attend_int8(q, k, v, order.lengths)[order.places].float()
    theirs = (expected - exact).norm() / exact.norm()
    assert torch.isfinite(found).all()
    assert (found - exact).norm() / exact.norm() <= 1.15 * theirs
    # Both round the same weights to FP8, the kernel relative to a maximum that may still grow.
    assert (found - expected).norm() / expected.norm() <= 0.04
    # No part of the result is lost or shrunk.
    assert ((found * expected).sum() / expected.square().sum() - 1).abs() <= 0.005
