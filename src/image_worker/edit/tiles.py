"""The VAE's way to a large picture: whole where there is memory for that, and else in tiles."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from image_worker.errors import OutOfMemory
from image_worker.model.build import Model
from image_worker.model.memory import memory_errors, with_room
from image_worker.model.placement import TILE_SIDE

log = logging.getLogger(__name__)


def through_vae(model: Model, pixels: int, work: Callable[[int | None], Tensor]) -> Tensor:
    """What `work` returns; it is given the side of its tiles in pixels, or None for no tiles.

    pixels: of the picture. Where memory runs out, it is tried again with tiles, and then with less
    of the model on the card.

    Raises:
        OutOfMemory: not even a tile has room.
    """
    if not needs_tiles(model, pixels):
        try:
            with memory_errors("the VAE"):
                return work(None)
        except OutOfMemory:
            if pixels <= TILE_SIDE**2 and not model.make_room():
                raise
            log.warning(
                "a picture of %d pixels had no room as a whole: it is done in tiles", pixels
            )
    return with_room(model.make_room, lambda: work(TILE_SIDE))


def needs_tiles(model: Model, pixels: int) -> bool:
    """By the plan."""
    limit = model.plan.max_pixels
    return limit is not None and pixels > limit
