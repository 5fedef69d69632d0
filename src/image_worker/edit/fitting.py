"""Which size would fit, for a job that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from image_worker.edit.batching import Length
from image_worker.edit.conditions import Prepared, row_lengths
from image_worker.edit.sizes import shrunk, tokens
from image_worker.errors import OutOfMemory
from image_worker.model.build import Model
from image_worker.model.memory import free_memory


def check_fits(
    model: Model, prepared: Prepared, size: tuple[int, int], lora_bytes: int = 0
) -> None:
    """Refuses a job for whose forward the card has no room, whatever weights leave it for that.

    size: (width, height) in pixels; lora_bytes: what its LoRAs take on the card.

    Raises:
        OutOfMemory: says what would fit.
    """
    rows = row_lengths(model, prepared, size, 1)
    fitting = model.plan.most_tokens
    if fitting is not None and model.plan.token_bytes:
        fitting = max(0, fitting - math.ceil(lora_bytes / model.plan.token_bytes))
    refusal = _refusal(model, size, len(prepared.references), rows, fitting)
    if refusal is not None:
        raise OutOfMemory(refusal)


def what_fits(
    model: Model, size: tuple[int, int], references: int, rows: Sequence[Length]
) -> str | None:
    """The error of a job for whose forward the card has no memory left; None where unknown.

    references: how many. None, too, where the job was forecast to fit: then the forecast is wrong
    for other sizes.
    """
    return _refusal(model, size, references, rows, model.plan.tokens_within(free_memory()))


def _refusal(
    model: Model,
    size: tuple[int, int],
    references: int,
    rows: Sequence[Length],
    fitting: int | None,
) -> str | None:
    """None where no row has more than `fitting` tokens."""
    needed = max(row.total for row in rows)
    if fitting is None or fitting >= needed:
        return None
    _, height, width = tokens(*size)
    beside = needed - height * width  # its references and its longest prompt
    found = shrunk(size, fitting - beside, model.entry.min_side)
    if found:
        remedy = f"{found[0]}x{found[1]} instead of {size[0]}x{size[1]} would fit"
    elif references > 1:
        remedy = f"no result of this shape fits beside {references} pictures; use fewer of them"
    else:
        remedy = "no result of this shape fits"
    return f"this job needs more memory than the card has left: {remedy}"
