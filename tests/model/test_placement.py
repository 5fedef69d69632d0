"""The plan, at the sizes of the full model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from image_worker.errors import DoesNotFit
from image_worker.model.hardware import GIB, Hardware
from image_worker.model.placement import RESERVE, SHARED_TOKENS, Shape, Sizes, plan
from image_worker.settings import Settings

TRANSFORMER, LAYERS, VISION = (
    "transformer/blocks",
    "text_encoder/language_model.layers",
    "text_encoder/visual.blocks",
)


def sizes(transformer: float, layers: float, vision: float = 1.3, rest: float = 0.7) -> Sizes:
    """In GiB, all lists together."""
    lists = {TRANSFORMER: (transformer, 60), LAYERS: (layers, 28), VISION: (vision, 32)}
    return Sizes(
        int(rest * GIB),
        {name: [int(total * GIB) // count] * count for name, (total, count) in lists.items()},
    )


# About those of Qwen-Image-Edit-2509, modulation on disk.
SIZES: Any = {
    "bf16": sizes(25.3, 12.2),
    "fp8": sizes(12.7, 6.1),
    "8bit": sizes(12.7, 6.1),
    "svdq": sizes(7.1, 3.5),
    "4bit": sizes(6.5, 3.2),
}
SHAPE = Shape(width=3072, zero_cond_t=False, vae_base=96, tokens=8448, pixels=1024 * 1024)


def decide(free: float | None, *, capability: tuple[int, int] = (8, 6), **variables: str) -> Any:
    settings = Settings.from_env({name.upper(): value for name, value in variables.items()})
    hardware = Hardware("CPU")
    if free is not None:
        hardware = Hardware("card", int(free * GIB), capability=capability)
    return plan(settings, SIZES, SHAPE, hardware)


def passing(found: Any) -> dict[str, list[int]]:
    """Numbers of the blocks that pass, by their lists."""
    numbers: dict[str, list[int]] = {TRANSFORMER: [], LAYERS: [], VISION: []}
    for unit in sorted(found.streamed):
        name, _, number = unit.rpartition(".")
        numbers[name].append(int(number))
    return numbers


@pytest.mark.parametrize(
    ("free", "precision", "streams"),
    [
        (139, "bf16", False),
        (79, "bf16", False),
        (47, "bf16", False),
        (39, "4bit", False),
        (15, "4bit", False),
        (11.5, "4bit", True),
        (6, "4bit", True),
        (4, "4bit", True),
    ],
)
def test_auto_by_free_memory(free: float, precision: str, streams: bool) -> None:
    found = decide(free)
    assert (found.precision, bool(found.streamed)) == (precision, streams)
    assert found.peak <= free * GIB


def test_the_transformer_stays_before_the_text_encoder() -> None:
    counts = [
        [len(numbers) for numbers in passing(decide(free, precision_mode="4bit")).values()]
        for free in (20, 13, 12, 10, 6, 4, 3.2)
    ]
    assert counts[0] == [0, 0, 0]
    assert counts[1][:2] == [0, 0] or counts[1][0] == 0
    assert counts[3][0] == 0 and counts[3][1] > 0, "at 10 GiB all of the transformer stays"
    assert 0 < counts[4][0] < counts[5][0] < counts[6][0] <= 60
    assert counts[4][1] == 28, "at 6 GiB none of the language model"
    for count in counts:
        assert not any(number % 2 for number in count), "each buffer serves as many blocks"
    assert counts == sorted(counts), "the less memory, the more passes"


def test_blocks_that_pass_stand_evenly_among_the_others() -> None:
    numbers = passing(decide(6))[TRANSFORMER]
    stays = sorted(set(range(60)) - set(numbers))
    gaps = {after - before for before, after in itertools.pairwise(stays)}
    assert len(gaps) <= 2 and max(gaps) - min(gaps) <= 1


def test_the_vae_works_in_tiles_rather_than_that_the_transformer_passes() -> None:
    whole, tiles, passes = decide(9.5), decide(8.9), decide(6)
    assert not passing(whole)[TRANSFORMER] and whole.max_pixels >= SHAPE.pixels
    assert not passing(tiles)[TRANSFORMER] and tiles.max_pixels < SHAPE.pixels
    assert passing(passes)[TRANSFORMER] and passes.max_pixels >= SHAPE.pixels


@pytest.mark.parametrize("free", [4, 6, 10])
def test_where_weights_pass_there_is_room_for_a_batch_of_small_pictures(free: float) -> None:
    found = decide(free)
    if passing(found)[TRANSFORMER]:
        assert found.max_tokens >= SHARED_TOKENS
    assert found.most_tokens >= found.max_tokens


def test_a_job_may_have_the_room_of_what_stays_unless_all_shall_stay() -> None:
    free = decide(15)
    assert free.most_tokens > free.max_tokens
    kept = decide(15, cpu_offload="none")
    assert kept.most_tokens == kept.max_tokens


def test_a_list_of_one_block_passes_through_one_buffer() -> None:
    small = Sizes(0, {TRANSFORMER: [GIB], LAYERS: [GIB, GIB, GIB]})
    settings = Settings.from_env({"CPU_OFFLOAD": "stream", "PRECISION_MODE": "4bit"})
    found = plan(settings, {"4bit": small}, SHAPE, Hardware("card", 20 * GIB))
    assert found.weights == 3 * GIB
    assert passing(found) == {TRANSFORMER: [0], LAYERS: [0, 1, 2], VISION: []}


@pytest.mark.parametrize(
    ("free", "precision"), [(47, "bf16"), (39, "fp8"), (31, "fp8"), (23, "4bit")]
)
def test_auto_takes_fp8_where_it_is_multiplied_and_leaves_room(free: float, precision: str) -> None:
    assert decide(free, capability=(8, 9)).precision == precision
    assert decide(39, capability=(8, 9), compute="bf16").precision == "4bit"
    assert decide(39, capability=(8, 9), compute="int8").precision == "4bit"
    # Nor is a precision taken that cannot be multiplied as asked.
    assert decide(140, capability=(8, 0), compute="int8").precision == "4bit"
    assert decide(140, capability=(9, 0), compute="fp8").precision in ("fp8", "4bit")
    assert decide(39, capability=(8, 9), bnb_compute="fp16").precision == "4bit"
    assert not decide(23, capability=(8, 9), precision_mode="fp8").streamed


def test_room_is_counted_in_tokens_as_it_was_planned() -> None:
    found = decide(23)
    free = RESERVE + 1000 * found.token_bytes
    assert [found.tokens_within(free + more) for more in (-1, 0)] == [999, 1000]
    assert found.tokens_within(0) == 0
    assert decide(None).tokens_within(0) is None


def test_an_explicit_precision_is_kept() -> None:
    assert decide(139, precision_mode="4bit").precision == "4bit"
    assert decide(21, precision_mode="8bit").streamed
    assert not decide(24, precision_mode="8bit").streamed


def test_that_weights_pass_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert decide(21, precision_mode="8bit").streamed
    assert "8bit on the card takes 22.4 GiB; so some of it passes through the card" in caplog.text
    assert "4 of text_encoder/language_model.layers" in decide(21, precision_mode="8bit").describe()


def test_zero_cond_t_takes_more_memory() -> None:
    import dataclasses

    hardware = Hardware("card", 23 * GIB)
    plans = [
        plan(Settings.from_env({}), SIZES, dataclasses.replace(SHAPE, zero_cond_t=flag), hardware)
        for flag in (False, True)
    ]
    assert plans[0].max_tokens > plans[1].max_tokens  # type: ignore[operator]


def test_explicit_offload_is_kept() -> None:
    for name in ("stream", "model"):
        counts = [len(numbers) for numbers in passing(decide(139, cpu_offload=name)).values()]
        assert counts == [60, 28, 32]
    with pytest.raises(DoesNotFit):
        decide(12, cpu_offload="none")


def test_the_older_name_for_offload() -> None:
    found = decide(139, int8_cpu_offload="1")
    assert found.precision == "8bit" and len(found.streamed) == 120


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(DoesNotFit) as caught:
        decide(2)
    message = str(caught.value)
    assert "2.0 GiB are free on card" in message
    assert "4bit on the card takes" in message and "4bit in passing takes" in message


def test_room_decides_how_much_shares_a_forward_and_when_to_tile() -> None:
    small, large = decide(23), decide(139, precision_mode="4bit")
    assert SHAPE.tokens <= small.max_tokens < large.max_tokens
    assert SHAPE.pixels <= small.max_pixels < large.max_pixels
    tight = decide(11.5)
    assert tight.max_tokens >= SHAPE.tokens, "one row must always be possible"


@pytest.mark.parametrize("free", [4, 6, 11.5, 23, 139])
def test_what_is_planned_fits(free: float) -> None:
    found = decide(free, precision_mode="4bit")
    # 24 bytes a token and 14 a pixel, per unit of width, were measured at full size.
    assert found.weights + found.max_tokens * 24 * 3072 <= free * GIB
    assert found.weights + found.max_pixels * 14 * 96 <= free * GIB
    buffers = [blocks[0] * 2 for blocks in SIZES["4bit"].blocks.values()]
    stay = sum(
        sum(blocks) - len(passing(found)[name]) * blocks[0]
        for name, blocks in SIZES["4bit"].blocks.items()
    )
    used = sum(b for b, n in zip(buffers, passing(found).values(), strict=True) if n)
    assert found.weights == SIZES["4bit"].rest + stay + used


def test_the_cpu_has_no_limits() -> None:
    found = decide(None)
    assert (found.precision, found.streamed) == ("bf16", frozenset())
    assert found.max_tokens is None and found.max_pixels is None


def test_what_the_host_cannot_hold_is_read_from_disk(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_env({"PRECISION_MODE": "4bit"})
    plans = [
        plan(settings, SIZES, SHAPE, Hardware("card", 4 * GIB, host=host))
        for host in (None, 20 * GIB, 8 * GIB)
    ]
    assert [found.from_disk for found in plans] == [False, False, True]
    assert "and 8.0 are free: it is read from disk" in caplog.text
    assert "from disk" in plans[-1].describe()
    assert not plan(settings, SIZES, SHAPE, Hardware("card", 40 * GIB, host=GIB)).from_disk
