"""The plan, at the sizes of the full model."""

from __future__ import annotations

from typing import Any

import pytest

from image_worker.errors import DoesNotFit
from image_worker.model.placement import GIB, RESERVE, Hardware, Shape, Sizes, plan
from image_worker.settings import Settings

# Of Qwen-Image-Edit-2509, in GiB, modulation on the host.
SIZES: Any = {
    "bf16": Sizes(int(14.5 * GIB), int(25.4 * GIB), int(0.12 * GIB)),
    "fp8": Sizes(int(8.4 * GIB), int(12.8 * GIB), int(0.12 * GIB)),
    "8bit": Sizes(int(8.4 * GIB), int(12.8 * GIB), int(0.12 * GIB)),
    "4bit": Sizes(int(5.5 * GIB), int(6.6 * GIB), int(0.12 * GIB)),
}
SHAPE = Shape(width=3072, zero_cond_t=False, vae_base=96, tokens=8448, pixels=1024 * 1024)


def decide(free: float | None, *, capability: tuple[int, int] = (8, 6), **variables: str) -> Any:
    settings = Settings.from_env({name.upper(): value for name, value in variables.items()})
    hardware = Hardware("CPU")
    if free is not None:
        hardware = Hardware("card", int(free * GIB), capability=capability)
    return plan(settings, SIZES, SHAPE, hardware)


@pytest.mark.parametrize(
    ("free", "precision", "offload"),
    [
        (139, "bf16", "none"),
        (79, "bf16", "none"),
        (47, "bf16", "none"),
        (39, "4bit", "none"),
        (15, "4bit", "none"),
        (13, "4bit", "model"),
        (11.5, "4bit", "model"),
    ],
)
def test_auto_by_free_memory(free: float, precision: str, offload: str) -> None:
    found = decide(free)
    assert (found.precision, found.offload) == (precision, offload)
    assert found.peak <= free * GIB


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
    assert decide(23, capability=(8, 9), precision_mode="fp8").offload == "none"


def test_room_is_counted_in_tokens_as_it_was_planned() -> None:
    found = decide(23)
    free = RESERVE + 1000 * found.token_bytes
    assert [found.tokens_within(free + more) for more in (-1, 0)] == [999, 1000]
    assert found.tokens_within(0) == 0
    assert decide(None).tokens_within(0) is None


def test_an_explicit_precision_is_kept() -> None:
    assert decide(139, precision_mode="4bit").precision == "4bit"
    assert decide(21, precision_mode="8bit").offload == "model"
    assert decide(23, precision_mode="8bit").offload == "none"


def test_a_fall_back_to_offload_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert decide(21, precision_mode="8bit").offload == "model"
    assert "8bit with CPU_OFFLOAD=none takes 22.9" in caplog.text


def test_zero_cond_t_takes_more_memory() -> None:
    import dataclasses

    hardware = Hardware("card", 23 * GIB)
    plans = [
        plan(Settings.from_env({}), SIZES, dataclasses.replace(SHAPE, zero_cond_t=flag), hardware)
        for flag in (False, True)
    ]
    assert plans[0].max_tokens > plans[1].max_tokens  # type: ignore[operator]


def test_explicit_offload_is_kept() -> None:
    assert decide(139, cpu_offload="model").offload == "model"
    with pytest.raises(DoesNotFit):
        decide(12, cpu_offload="none")


def test_the_older_name_for_offload() -> None:
    found = decide(139, int8_cpu_offload="1")
    assert (found.precision, found.offload) == ("8bit", "model")


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(DoesNotFit) as caught:
        decide(7)
    message = str(caught.value)
    assert "7.0 GiB are free on card" in message
    assert "4bit with CPU_OFFLOAD=model takes" in message


def test_room_decides_how_much_shares_a_forward_and_when_to_tile() -> None:
    small, large = decide(23), decide(139, precision_mode="4bit")
    assert SHAPE.tokens <= small.max_tokens < large.max_tokens
    assert SHAPE.pixels <= small.max_pixels < large.max_pixels
    tight = decide(11.5)
    assert tight.max_tokens >= SHAPE.tokens, "one row must always be possible"


@pytest.mark.parametrize("free", [11.5, 23, 139])
def test_what_is_planned_fits(free: float) -> None:
    found = decide(free, precision_mode="4bit")
    resident = SIZES["4bit"].total if found.offload == "none" else SIZES["4bit"].transformer
    # 24 bytes a token and 14 a pixel, per unit of width, were measured at full size.
    assert resident + found.max_tokens * 24 * 3072 <= free * GIB
    kept = SIZES["4bit"].total if found.offload == "none" else SIZES["4bit"].vae
    assert kept + found.max_pixels * 14 * 96 <= free * GIB


def test_a_text_encoder_that_does_not_fit_counts() -> None:
    large = Sizes(text_encoder=12 * GIB, transformer=GIB, vae=0)
    settings = Settings.from_env({"PRECISION_MODE": "4bit"})
    with pytest.raises(DoesNotFit):
        plan(settings, {"4bit": large}, SHAPE, Hardware("card", 11 * GIB))


def test_the_cpu_has_no_limits() -> None:
    found = decide(None)
    assert (found.precision, found.offload) == ("bf16", "none")
    assert found.max_tokens is None and found.max_pixels is None
