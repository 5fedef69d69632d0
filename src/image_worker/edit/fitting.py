"""Which size would fit, for a job that did not."""

from __future__ import annotations

from image_worker.edit.batching import Load
from image_worker.edit.sizes import shrunk, tokens
from image_worker.model.build import Model
from image_worker.model.memory import free_memory


def what_fits(model: Model, size: tuple[int, int], references: int, load: Load) -> str | None:
    """The error of a job for whose forward the card has no memory; None where unknown.

    size: (width, height) in pixels; references: how many; load: its rows. None, too, where the job
    was forecast to fit: then the forecast is wrong for other sizes.
    """
    fitting = model.plan.tokens_within(free_memory())
    needed = max(row.total for row in load.rows)
    if fitting is None or fitting >= needed:
        return None
    _, rows, columns = tokens(*size)
    beside = needed - rows * columns  # its references and its longest prompt
    found = shrunk(size, fitting - beside, model.entry.min_side)
    if found:
        remedy = f"{found[0]}x{found[1]} instead of {size[0]}x{size[1]} would fit"
    elif references > 1:
        remedy = f"no result of this shape fits beside {references} pictures; use fewer of them"
    else:
        remedy = "no result of this shape fits"
    return f"this job needs more memory than the card has left: {remedy}"
