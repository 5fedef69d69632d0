"""A recipe's prepared weights: read where an earlier start left them, written where none did."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_worker.errors import ModelMismatch, ModelUnavailable
from image_worker.model import components, files, layers, prepared, sources
from image_worker.model.components import Component
from image_worker.model.layers import PreparedLayers
from image_worker.model.loader import Reading
from image_worker.model.memory import release
from image_worker.model.packed import Slot
from image_worker.model.placement import Plan
from image_worker.model.prepared import Prepared, Unit
from image_worker.model.recipe import Recipe, as_served, empty_component
from image_worker.model.stream import blocks_of
from image_worker.model.transformer import Transformer
from image_worker.settings import Settings

log = logging.getLogger(__name__)

_TABLES = "transformer/modulation"
_WHOLE = "-whole"  # ends the name of a folder that has modulation's layers, too


def is_wanted(settings: Settings, device: torch.device) -> bool:
    """Whether prepared weights are to be read and written."""
    wanted = settings.keep_prepared
    return wanted in ("1", "whole") or (wanted == "auto" and device.type == "cuda")


def may_do_without(settings: Settings, device: torch.device) -> bool:
    """Whether there are prepared weights, of whatever key, that need no checkpoint."""
    single = settings.checkpoint or settings.text_encoder_checkpoint
    if single or not is_wanted(settings, device):
        return False
    return any(_home(settings).glob(f"*{_WHOLE}/{prepared.MANIFEST}"))


def _home(settings: Settings) -> Path:
    return settings.model_dir / "prepared"


class Store:
    """This recipe's prepared weights: read where they are there, written where they are not.

    Those that are whole have modulation's layers, too, and need no checkpoint. They serve whatever
    is wanted; others serve where whole ones are not asked for, and the checkpoint is there.
    """

    def __init__(self, recipe: Recipe, decided: Plan) -> None:
        """Begins to read them.

        Raises:
            ModelUnavailable: neither they nor the checkpoint is there, and `LOCAL_ONLY` is set.
        """
        self._recipe, self._precision = recipe, decided.precision
        self._reading: Reading | None = None
        self._wanted = is_wanted(recipe.settings, recipe.device)
        self._facts = self._made_of()
        plain = _home(recipe.settings) / prepared.key(self._facts)
        whole = plain.with_name(f"{plain.name}{_WHOLE}")
        self._is_for_whole = recipe.settings.keep_prepared == "whole"
        self._folder = whole if self._is_for_whole else plain
        self._found: Prepared | None = None
        if self._wanted:
            self._found = self._find(whole)
            if self._found is None and recipe.is_complete and not self._is_for_whole:
                self._found = self._find(plain)
        if self._found is None and not recipe.is_complete:
            self._miss(whole)
        self._begin(decided)

    def is_to_write(self, model: Any) -> bool:
        """Whether there is none, or not all of it, and should be: LoRAs that are not merged share a
        folder, but each has tables of its own."""
        if self._found is None:
            return self._wanted
        missing = f"{self._tables_file}.safetensors" not in self._found.files
        return missing and bool(model.transformer.modulation.tables())

    @property
    def is_there(self) -> bool:
        """Whether there is one, as far as is known."""
        return self._found is not None

    def read(self, component: Component) -> nn.Module | None:
        """A component as it is served; None: it is not there, or damaged, and then taken away."""
        if self._reading is None or self._found is None:
            return None
        recipe = self._recipe
        module = empty_component(recipe, component, self._precision)
        modulation = self._layers
        module = as_served(recipe, component, module, modulation)
        try:
            held = self._reading.fill(component.units(module))
            component.stream(module, held, recipe.device)
            if isinstance(module, Transformer):
                if modulation is not None:
                    modulation.check(module.modulation.layers)
                self._put_tables(module)
        except ModelMismatch as error:
            self._discard(self._found.folder, error)
            del module
            release()  # and what was filled already
            return None
        return module

    def close(self) -> None:
        """When everything is read."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def write(self, model: Any) -> None:
        """Writes what is loaded and not there. Where that cannot be, the model serves all the
        same."""
        try:
            if self._found is not None:
                prepared.add(self._found.folder, *self._made_tables(model))
                return
            with ExitStack() as at_home:
                for blocks in blocks_of(model.text_encoder, model.transformer):
                    at_home.enter_context(blocks.at_home())
                prepared.write(self._folder, self._units(model), self._facts)
            self._found = self._find(self._folder)
            if self._layers is not None:  # so that the checkpoint may go
                model.transformer.modulation.read = self._layers
        except (OSError, RuntimeError) as error:  # torch's, of memory that cannot be had
            log.warning("prepared weights could not be kept in %s: %s", self._folder.parent, error)

    def _units(self, model: Any) -> dict[str, Unit]:
        """What each file is to hold."""
        found: dict[str, list[Slot]] = {}
        for component in components.ALL:
            found |= component.units(getattr(model, component.name))
        units = {name: Unit.of(slots) for name, slots in found.items()}
        modulation = model.transformer.modulation
        if modulation.tables():
            name, unit = self._made_tables(model)
            units[name] = unit
        return units | layers.units(modulation) if self._is_for_whole else units

    def _made_tables(self, model: Any) -> tuple[str, Unit]:
        """The file of modulation's tables, and what it is to hold."""
        made = model.transformer.modulation.tables()
        slots = [Slot(repr(level), _Held(table), "table") for level, table in made.items()]
        return self._tables_file, Unit.of(slots)

    def _find(self, folder: Path) -> Prepared | None:
        try:
            return Prepared.find(folder)
        except ModelMismatch as error:
            self._discard(folder, error)
            return None

    def _miss(self, whole: Path) -> None:
        """The checkpoint is needed after all."""
        log.info("%s is not there, which would do without the checkpoint", whole)
        if self._recipe.settings.local_only:
            raise ModelUnavailable(
                "not all of the model's and LoRA's files are on this machine, nor is prepared/"
                f"{whole.name} in MODEL_DIR, which would do without; LOCAL_ONLY=1 forbids downloads"
            )

    def _begin(self, decided: Plan) -> None:
        """To read them, if they are there."""
        if self._found is None:
            return
        named = [name.removesuffix(".safetensors") for name in self._found.files]
        names = [
            name
            for component in components.ALL
            for name in named
            if name.startswith(f"{component.name}/") and self._is_ours(name)
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
            self._discard(self._found.folder, error)

    def _discard(self, folder: Path, error: ModelMismatch) -> None:
        log.warning("the prepared weights are damaged, and will be made again: %s", error)
        self.close()
        self._found = None
        prepared.discard(folder)

    @property
    def _layers(self) -> PreparedLayers | None:
        """What reads modulation's, if there are whole prepared weights."""
        found = self._found
        return PreparedLayers(found) if found and found.folder.name.endswith(_WHOLE) else None

    def _put_tables(self, transformer: Transformer) -> None:
        """Of a folder all but these is right without them, and they can be made at any time."""
        try:
            transformer.modulation.put(self._tables())
        except ModelMismatch as error:
            log.warning("modulation's tables are made again: %s", error)

    def _tables(self) -> dict[float, torch.Tensor]:
        """Modulation's that were kept."""
        assert self._reading is not None and self._found is not None
        name = self._tables_file
        if f"{name}.safetensors" not in self._found.files:
            return {}
        return {float(level): table for level, table in self._reading.tensors(name).items()}

    @property
    def _tables_file(self) -> str:
        """Tables are of the LoRAs beside the weights, too, and nothing else in the folder is."""
        beside = self._recipe.beside
        if beside is None:
            return _TABLES
        facts = json.dumps(sources.facts_of_files(beside.paths))
        return f"{_TABLES}-{prepared.digest(facts.encode())}"

    def _is_ours(self, name: str) -> bool:
        return not name.startswith(_TABLES) or name == self._tables_file

    def _made_of(self) -> dict[str, Any]:
        recipe = self._recipe
        settings, folder = recipe.settings, recipe.folder
        singles = {name: single.path for name, single in recipe.checkpoints.items()}
        parts: dict[str, Any] = {}
        if self._precision == "svdq":
            parts |= {"rank": settings.svdq_rank, "ranges": recipe.ranges.digest}
        if settings.checkpoint_decode:
            parts["decoded"] = True
        return parts | {
            "model": recipe.entry.name,
            "precision": self._precision,
            "files": sources.facts_of_model(folder, singles),
            "loras": sources.facts_of_files(recipe.loras),
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
