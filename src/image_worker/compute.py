"""What the transformer's products are computed in: tables, by the weights and by the card.

"bf16" is the type in which the model computes (`BNB_COMPUTE`): weights in few bits are widened, or
multiplied as their library does. In "fp8" and "int8" activations are rounded, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from image_worker.settings import Precision

Compute = Literal["bf16", "fp8", "int8"]
Capability = tuple[int, int]

LEAST: dict[Compute, Capability] = {"bf16": (0, 0), "fp8": (8, 9), "int8": (7, 5)}
POSSIBLE: dict[Precision, tuple[Compute, ...]] = {
    "bf16": ("bf16",),
    "fp8": ("bf16", "fp8"),
    "8bit": ("bf16", "int8"),
    "svdq": ("bf16", "fp8", "int8"),
    "4bit": ("bf16", "fp8", "int8"),
}
# The first that the card's compute capability is enough for. int8 is there to be asked for: of the
# cards that lack FP8, none has measured it yet.
AUTOMATIC: dict[Precision, tuple[tuple[Capability, Compute], ...]] = {
    "bf16": (((0, 0), "bf16"),),
    "fp8": (((8, 9), "fp8"), ((0, 0), "bf16")),
    "8bit": (((0, 0), "bf16"),),
    "svdq": (((8, 9), "fp8"), ((0, 0), "bf16")),
    "4bit": (((8, 9), "fp8"), ((0, 0), "bf16")),
}


def possible(
    precision: Precision, capability: Capability | None, *, bf16: bool
) -> tuple[Compute, ...]:
    """What COMPUTE may ask for.

    capability: of the card; None for a CPU, which emulates everything. bf16: whether that is the
    type in which the model computes, which cards ask of FP8.
    """
    if capability is None:
        return POSSIBLE[precision]
    return tuple(
        compute
        for compute in POSSIBLE[precision]
        if capability >= LEAST[compute] and (bf16 or compute != "fp8")
    )


def automatic(precision: Precision, capability: Capability | None, *, bf16: bool) -> Compute:
    """What COMPUTE=auto takes; its arguments are those of `possible`."""
    known = capability or (0, 0)
    found = next(compute for least, compute in AUTOMATIC[precision] if known >= least)
    return found if found in possible(precision, capability, bf16=bf16) else "bf16"
