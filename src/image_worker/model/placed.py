"""A component from its checkpoint, made where the plan has it; `loader.py` reads prepared ones."""

from __future__ import annotations

import torch
from torch import nn

from image_worker.errors import DoesNotFit
from image_worker.model.components import Component
from image_worker.model.packed import HOST, move
from image_worker.model.placement import Plan
from image_worker.model.recipe import Recipe, as_served, read_component
from image_worker.model.stream import Held


def load_placed(recipe: Recipe, component: Component, decided: Plan) -> nn.Module:
    """What shall pass through the card is made there, block by block, and leaves it again.

    What stays is put together unit by unit, as prepared weights are: tensors lie where there was
    room between intermediate results, and such gaps were 3 GiB of 40.

    Raises:
        DoesNotFit: the host's memory would have to hold it, and cannot.
    """
    if decided.from_disk:
        raise DoesNotFit(
            "the host's memory does not hold the weights that pass through the card, and none are "
            f"prepared: run `PRECISION_MODE={decided.precision} COMPUTE={recipe.compute} python -m "
            "image_worker prepare` on a machine with more memory and a card of the same kind, with "
            "the other settings and MODEL_DIR as here"
        )
    module = read_component(recipe, component, decided.precision, away=decided.streamed)
    module = as_served(recipe, component, module)
    held = {}
    for name, slots in component.units(module).items():
        if name in decided.streamed:
            held[name] = Held.of(slots, recipe.device)
            held[name].settle()  # so that what they held before is free
        elif not name.endswith(f"/{HOST}"):
            move(slots, recipe.device)
    torch.cuda.empty_cache()
    component.stream(module, held, recipe.device)
    return module
