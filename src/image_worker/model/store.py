"""A recipe's prepared weights: read where an earlier start left them, written where none did."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from image_worker.errors import ModelMismatch
from image_worker.model import components, files, prepared, weights
from image_worker.model.components import Component
from image_worker.model.loader import Reading
from image_worker.model.packed import Slot
from image_worker.model.placement import Plan
from image_worker.model.prepared import Prepared
from image_worker.model.recipe import Recipe, as_served
from image_worker.model.stream import blocks_of
from image_worker.model.transformer import Transformer

log = logging.getLogger(__name__)

_TABLES = "transformer/modulation"


class Store:
    """This recipe's prepared weights: read where they are there, written where they are not."""

    def __init__(self, recipe: Recipe, decided: Plan) -> None:
        """Begins to read them."""
        self._recipe, self._precision = recipe, decided.precision
        self._reading: Reading | None = None
        wanted = recipe.settings.keep_prepared
        self._wanted = wanted == "1" or (wanted == "auto" and recipe.device.type == "cuda")
        self._facts = self._made_of()
        self._folder = recipe.settings.model_dir / "prepared" / prepared.key(self._facts)
        self._found = self._find() if self._wanted else None
        self._begin(decided)

    @property
    def is_to_write(self) -> bool:
        """Whether there is none, and should be one."""
        return self._wanted and self._found is None

    @property
    def is_there(self) -> bool:
        """Whether there is one, as far as is known."""
        return self._found is not None

    def read(self, component: Component) -> nn.Module | None:
        """A component as it is served; None: it is not there, or damaged, and then taken away."""
        if self._reading is None:
            return None
        recipe = self._recipe
        module = component.empty(recipe.folder / component.name)
        weights.empty(module, component.storage(self._precision, recipe.settings, recipe.dtype))
        module = as_served(recipe, component, module)
        try:
            held = self._reading.fill(component.units(module))
            component.stream(module, held, recipe.device)
            if isinstance(module, Transformer) and self._has_tables:
                tables = self._reading.tensors(_TABLES)
                module.modulation.put({float(name): table for name, table in tables.items()})
        except ModelMismatch as error:
            self._discard(error)
            del module
            gc.collect()  # the transformer holds itself, and what was filled already
            torch.cuda.empty_cache()
            return None
        return module

    def close(self) -> None:
        """When everything is read."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def write(self, model: Any) -> None:
        """Writes what is loaded. Where that cannot be, the model serves all the same."""
        found: dict[str, list[Slot]] = {}
        for component in components.ALL:
            found |= component.units(getattr(model, component.name))
        made = model.transformer.modulation.tables()
        if made:
            held = {repr(level): _Held(table) for level, table in made.items()}
            found[_TABLES] = [Slot(name, owner, "table") for name, owner in held.items()]
        try:
            with ExitStack() as at_home:
                for blocks in blocks_of(model.text_encoder, model.transformer):
                    at_home.enter_context(blocks.at_home())
                prepared.write(self._folder, found, self._facts)
            self._found = self._find()
        except (OSError, RuntimeError) as error:  # torch's, of memory that cannot be had
            log.warning("prepared weights could not be kept in %s: %s", self._folder.parent, error)

    def _find(self) -> Prepared | None:
        try:
            return Prepared.find(self._folder)
        except ModelMismatch as error:
            self._discard(error)
            return None

    def _begin(self, decided: Plan) -> None:
        """To read them, if they are there."""
        if self._found is None:
            return
        named = [name.removesuffix(".safetensors") for name in self._found.files]
        names = [
            name
            for component in components.ALL
            for name in named
            if name.startswith(f"{component.name}/")
        ]
        try:
            self._reading = Reading(
                self._found,
                names,
                self._recipe.device,
                decided.streamed,
                from_disk=decided.from_disk,
            )
        except ModelMismatch as error:
            self._discard(error)

    def _discard(self, error: ModelMismatch) -> None:
        log.warning("the prepared weights are damaged, and will be made again: %s", error)
        self.close()
        self._found = None
        prepared.discard(self._folder)

    @property
    def _has_tables(self) -> bool:
        return self._found is not None and f"{_TABLES}.safetensors" in self._found.files

    def _made_of(self) -> dict[str, Any]:
        recipe = self._recipe
        settings, folder = recipe.settings, recipe.folder
        shards = [path for name in files.COMPONENTS for path in files.weight_files(folder / name)]
        return {
            "model": recipe.entry.name,
            "precision": self._precision,
            "files": prepared.facts_of_files(shards),
            "loras": prepared.facts_of_files(recipe.loras),
            "quantised": settings.quantize_components,
            "numbers": str(recipe.dtype),
            "products": recipe.compute,
            "made on": recipe.device.type,
            "configurations": [
                prepared.digest((folder / name / "config.json").read_bytes())
                for name in files.COMPONENTS
            ],
            "libraries": [version("bitsandbytes")],
        }


@dataclass(frozen=True)
class _Held:
    """One of modulation's tables, as a slot's owner."""

    table: torch.Tensor
