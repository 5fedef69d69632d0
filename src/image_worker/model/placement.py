"""Where weights shall live: a plan, computed from sizes and free memory before anything is loaded.

What the card cannot hold stays on the host, block by block, and passes through it (`stream.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from image_worker.compute import POSSIBLE, automatic
from image_worker.errors import DoesNotFit
from image_worker.model.hardware import GIB, Hardware
from image_worker.model.host import HOST_RESERVE
from image_worker.model.stream import BUFFERS
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)

# Measured at full size on one card by `python -m image_worker.bench.full_size`: peak working
# memory above the weights, per image or text token and unit of model width, and per pixel and unit
# of the VAE's base width. The latter is of diffusers' modules; ours take 6 by a count of tensors
# without a card, which leaves out what cuDNN takes. fp8 and svdq are taken to be as 4bit;
# attention in int8 takes less than the one that was measured, and so do products of 8bit in int8
# than bitsandbytes' own, by the sizes of what they keep.
DENOISE_BYTES = {"bf16": 21, "fp8": 24, "8bit": 45, "svdq": 24, "4bit": 24}
ZERO_COND_BYTES = 12  # more while denoising with `zero_cond_t`: modulation per token, not per row
VAE_BYTES = 14
TILE_SIDE = 512  # pixels; a tile's working memory is that of a picture of this size
FP8_SHARE = 0.75  # of the free memory, at most, for fp8 by itself: the rest is for batches
# The CUDA libraries' own memory, the allocator's gaps, and room for weights decoded from 4 bits:
# 72 MiB in 8 bits, 144 in 16.
RESERVE = GIB // 2
# Where weights pass through the card, there is room for a forward of so many tokens at least: a
# pass serves a batch of four small pictures as well as one of the usual size.
SHARED_TOKENS = 10_240


@dataclass(frozen=True)
class Sizes:
    """Bytes of the model's weights at one precision.

    rest: of what is in no block; blocks: of each list of blocks, by its name, in their order; the
    list whose blocks shall stay first of all comes first.
    """

    rest: int
    blocks: Mapping[str, Sequence[int]]

    @property
    def total(self) -> int:
        """All together."""
        return self.rest + sum(map(sum, self.blocks.values()))


@dataclass(frozen=True)
class Shape:
    """What working memory depends on: the model's widths, and the usual job's tokens and pixels."""

    width: int
    zero_cond_t: bool
    vae_base: int
    tokens: int
    pixels: int


@dataclass(frozen=True)
class Plan:
    """What was decided, and what it is forecast to take. None: memory is not planned.

    streamed: units of blocks that pass through the card, such as "transformer/blocks.07";
    from_disk: they are read at every pass, since the host has no memory for them;
    weights: bytes of the card that weights take, buffers for passing ones included;
    max_tokens: tokens in one forward of the transformer; most_tokens: if no block stayed;
    max_pixels: the largest picture that the VAE takes without tiles; peak: forecast bytes for the
    usual job; token_bytes: forecast working memory of a forward, per token.
    """

    precision: Precision
    streamed: frozenset[str] = frozenset()
    from_disk: bool = False
    weights: int | None = None
    max_tokens: int | None = None
    most_tokens: int | None = None
    max_pixels: int | None = None
    peak: int | None = None
    token_bytes: int | None = None

    def describe(self) -> str:
        """One line for the log."""
        peak = "" if self.peak is None else f", forecast peak {self.peak / GIB:.1f} GiB"
        return f"{self.precision}, {self._places()}{peak}"

    def _places(self) -> str:
        if not self.streamed:
            return "everything on the device"
        counts: dict[str, int] = {}
        for unit in self.streamed:
            name = unit.rpartition(".")[0]
            counts[name] = counts.get(name, 0) + 1
        passing = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        source = "from disk at every pass" if self.from_disk else "from the host"
        return f"blocks that pass through the card, {source}: {passing}"

    def streams(self, component: str) -> bool:
        """Whether any of a component's blocks passes through the card."""
        return any(unit.startswith(f"{component}/") for unit in self.streamed)

    def tokens_within(self, free: int) -> int | None:
        """Tokens of a forward that fits into so many bytes; None where memory is not planned."""
        return None if self.token_bytes is None else max(0, free - RESERVE) // self.token_bytes


@dataclass(frozen=True)
class _Work:
    """Working memory, in bytes: of a token, of the usual forward, of the VAE whole and in tiles."""

    token: int
    denoise: int
    pixel: int
    whole: int
    tile: int

    @classmethod
    def of(cls, precision: Precision, shape: Shape) -> _Work:
        extra = ZERO_COND_BYTES if shape.zero_cond_t else 0
        token = (DENOISE_BYTES[precision] + extra) * shape.width
        pixel = VAE_BYTES * shape.vae_base
        tile = min(shape.pixels, TILE_SIDE**2)
        return cls(token, token * shape.tokens, pixel, pixel * shape.pixels, pixel * tile)


def plan(
    settings: Settings, sizes: Mapping[Precision, Sizes], shape: Shape, hardware: Hardware
) -> Plan:
    """Chooses precision and places: the first that fits, the most exact and fastest first.

    "auto" passes over 8bit, since bitsandbytes' int8 takes over twice as long as its NF4; and over
    fp8 where the card cannot multiply it. What passes through the card is 4bit, if it may choose.

    Raises:
        DoesNotFit: nothing that the settings allow fits; says what it would take.
    """
    precisions = _precisions(settings, hardware)
    free = hardware.free
    if free is None:
        return Plan(precisions[0])
    tried: list[str] = []
    for found in _candidates(settings, precisions, sizes, shape, free):
        assert found.peak is not None
        share = FP8_SHARE if found.precision == "fp8" and len(precisions) > 1 else 1.0
        if found.peak <= share * free:
            if tried and found.streamed and len(precisions) == 1:
                log.warning("%s; so some of it passes through the card", "; ".join(tried))
            return _with_source(found, sizes[found.precision], hardware)
        places = "in passing" if found.streamed else "on the card"
        tried.append(f"{found.precision} {places} takes {found.peak / GIB:.1f} GiB")
    raise DoesNotFit(
        f"the model does not fit: {free / GIB:.1f} GiB are free on {hardware.name}; "
        + "; ".join(tried)
    )


def _with_source(found: Plan, sizes: Sizes, hardware: Hardware) -> Plan:
    """What passes comes from the host's memory, if that has room for it."""
    named = {
        f"{name}.{number:02d}": size
        for name, blocks in sizes.blocks.items()
        for number, size in enumerate(blocks)
    }
    needed = sum(named[unit] for unit in found.streamed) + HOST_RESERVE
    if not found.streamed or hardware.host is None or needed <= hardware.host:
        return found
    log.warning(
        "%.1f GiB of the host's memory are needed for what passes through the card, and %.1f are "
        "free: it is read from disk, every time, which is slow",
        needed / GIB,
        hardware.host / GIB,
    )
    return replace(found, from_disk=True)


def _precisions(settings: Settings, hardware: Hardware) -> list[Precision]:
    """Those that may be chosen."""
    if settings.int8_cpu_offload:
        return ["8bit"]
    if settings.precision_mode != "auto":
        return [settings.precision_mode]
    found: list[Precision] = ["bf16", "4bit"]
    bf16 = settings.bnb_compute == "bf16"
    multiplies_fp8 = automatic("fp8", hardware.capability, bf16=bf16) == "fp8"
    if multiplies_fp8 and settings.compute in ("auto", "fp8"):
        found.insert(1, "fp8")
    if settings.compute != "auto":
        found = [one for one in found if settings.compute in POSSIBLE[one]]
    return found


def _candidates(
    settings: Settings,
    precisions: Sequence[Precision],
    sizes: Mapping[Precision, Sizes],
    shape: Shape,
    free: int,
) -> Iterator[Plan]:
    least = settings.cpu_offload == "stream" or settings.int8_cpu_offload
    if not least:
        for precision in precisions:
            found = _planned(precision, sizes[precision], _Work.of(precision, shape), free, {})
            stays = settings.cpu_offload == "none"
            yield replace(found, most_tokens=found.max_tokens) if stays else found
    if settings.cpu_offload != "none":
        last = precisions[-1]
        yield _streamed(last, sizes[last], _Work.of(last, shape), free, least=least)


def _streamed(precision: Precision, sizes: Sizes, work: _Work, free: int, *, least: bool) -> Plan:
    """As many blocks stay as fit; with `least`, none.

    Tiles cost the VAE half as much again, and copies nothing as long as they take less time than
    the work that they hide behind: so the VAE has room to work whole, unless with tiles the whole
    first list stays.
    """
    denoise = max(work.denoise, work.token * SHARED_TOKENS)
    found = []
    for vae in (work.whole, work.tile):
        room = 0 if least else free - RESERVE - sizes.rest - max(denoise, vae)
        found.append(which_pass(sizes.blocks, room))
    first = next(iter(sizes.blocks))
    whole, tiled = (_planned(precision, sizes, work, free, passing) for passing in found)
    assert whole.max_pixels is not None
    fits = whole.max_pixels * work.pixel >= work.whole
    return whole if fits and (found[1][first] or not found[0][first]) else tiled


def which_pass(lists: Mapping[str, Sequence[int]], room: int) -> dict[str, list[int]]:
    """Numbers of the blocks that pass, list by list, if all weights shall take `room` bytes.

    Those that stay stand evenly among those that pass, whose copies so have time.
    """
    buffers = {name: min(BUFFERS, len(blocks)) * max(blocks) for name, blocks in lists.items()}
    room -= sum(buffers.values())
    found: dict[str, list[int]] = {}
    for name, blocks in lists.items():
        count = len(blocks)
        if sum(blocks) <= room + buffers[name]:
            found[name] = []
            room -= sum(blocks) - buffers[name]
            continue
        stay = min(max(0, room // max(blocks)), count - min(BUFFERS, count))
        stay -= (count - stay) % BUFFERS if stay else 0  # each buffer serves as many
        room -= stay * max(blocks)
        stays = {(2 * number + 1) * count // (2 * stay) for number in range(stay)}
        found[name] = [number for number in range(count) if number not in stays]
    return found


def _planned(
    precision: Precision,
    sizes: Sizes,
    work: _Work,
    free: int,
    passing: Mapping[str, Sequence[int]],
) -> Plan:
    """The plan in which those blocks pass."""

    def buffers(name: str) -> int:
        blocks = sizes.blocks[name]
        return min(BUFFERS, len(blocks)) * max(blocks)

    weights = sizes.total
    for name, numbers in passing.items():
        if numbers:
            weights += buffers(name) - sum(sizes.blocks[name][number] for number in numbers)
    least = min(weights, sizes.rest + sum(map(buffers, sizes.blocks)))
    room = free - RESERVE - weights
    vae = work.whole if room >= work.whole else work.tile
    tokens = room // work.token
    return Plan(
        precision,
        frozenset(f"{name}.{number:02d}" for name, some in passing.items() for number in some),
        weights=weights,
        max_tokens=max(work.denoise // work.token, tokens),
        most_tokens=max(tokens, (free - RESERVE - least) // work.token),
        max_pixels=max(0, room // work.pixel),
        peak=RESERVE + weights + max(work.denoise, vae),
        token_bytes=work.token,
    )
