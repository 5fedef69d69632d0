"""The path of a model, walked once at cold start: from settings to a model that is ready to edit.

settings → Recipe → Plan → VAE → text encoder → transformer (+ Lightning) → first edit

Weights come from the checkpoint's own files, or from those that an earlier start prepared. Those
are read while the rest is set up. Neither diffusers nor transformers is imported: that would take
longer than the reading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_worker import checkpoints
from image_worker.catalog import LIGHTNING_SAMPLER, ModelEntry, Sampler
from image_worker.errors import DoesNotFit, OutOfMemory
from image_worker.model import (
    components,
    from_checkpoint,
    in_folder,
    libraries,
    numbers,
    sources,
)
from image_worker.model.adapters import Adapter
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.cold_start import ColdStart
from image_worker.model.components import Component
from image_worker.model.hardware import Hardware
from image_worker.model.kept import Kept
from image_worker.model.memory import release
from image_worker.model.opened import Opened, open_files
from image_worker.model.opening import in_own_format
from image_worker.model.placed import load_placed
from image_worker.model.placement import Plan, plan
from image_worker.model.recipe import Incomplete, Recipe
from image_worker.model.remembered import Remembered
from image_worker.model.sources import Find, Sources
from image_worker.model.store import Store, may_do_without
from image_worker.model.stream import blocks_of
from image_worker.model.text_config import Patching, read_patching
from image_worker.model.tokenizer import TextTokenizer
from image_worker.model.wide import Wide
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Everything that an edit needs, loaded and placed; and what it encoded for earlier ones.

    weights: what the transformer's are stored as; adapters: LoRAs of earlier jobs, on the card.
    """

    entry: ModelEntry
    plan: Plan
    weights: str
    device: torch.device
    dtype: torch.dtype
    lightning_steps: int | None
    sampler: Sampler
    tokenizer: TextTokenizer
    patching: Patching
    text_encoder: Any
    transformer: Any
    vae: Any
    cold_start: ColdStart
    encodings: Remembered
    gives_room: bool = True
    adapters: Kept[Adapter] = field(default_factory=lambda: Kept(0))

    @property
    def steps(self) -> int:
        """Denoising steps of a job that names none."""
        return self.lightning_steps or self.entry.steps

    def make_room(self) -> bool:
        """Earlier jobs' LoRAs leave the card; then half of the weights that stay on it, which pass
        through it from now on.

        Returns false where there is nothing left that could leave.
        """
        if self.adapters.clear():
            torch.cuda.empty_cache()
            return True
        if not self.gives_room or self.plan.most_tokens == self.plan.max_tokens:
            return False
        lists = blocks_of(self.transformer, self.text_encoder)
        left = [blocks.give_up(self.device) for blocks in lists]
        torch.cuda.empty_cache()
        return any(left)


def build(
    settings: Settings,
    entry: ModelEntry,
    hardware: Hardware,
    *,
    dtype: torch.dtype | None = None,
    loras: Sequence[Path] = (),
    first_edit: Callable[[Model], None] | None = None,
) -> Model:
    """Walks the path. `dtype` overrides the type to compute in (tests use float32).

    loras: files for all jobs on top of Lightning, merged if it is; first_edit: tries the finished
    model; what cannot run fails here, before any job.

    Raises:
        OperatorError: files are missing or do not fit, a setting cannot be honoured, or the card
            is too small. Nothing is replaced by something lesser.
    """
    cold_start = ColdStart()
    dtype = dtype or numbers.choose_dtype(settings, hardware)

    def build_from(find: Find) -> Model:
        with cold_start.step("find files"):
            found = find(entry, settings, loras)
        return _build(settings, entry, hardware, dtype, found, cold_start, first_edit)

    if not may_do_without(settings, hardware.device):
        return build_from(sources.find_all)
    with suppress(Incomplete):
        return build_from(sources.find_least)
    release()
    return build_from(sources.find_all)


def _build(
    settings: Settings,
    entry: ModelEntry,
    hardware: Hardware,
    dtype: torch.dtype,
    found: Sources,
    cold_start: ColdStart,
    first_edit: Callable[[Model], None] | None,
) -> Model:
    """Plans, and starts as planned."""
    configs = components.read_configs(found.folder)
    shape = components.shape(entry, configs)
    opened = open_files(found, settings, configs)
    sizes = components.sizes(
        found.folder,
        settings,
        dtype,
        has_weights=found.is_complete,
        checkpoints=opened.checkpoints,
        beside=opened.beside.card_bytes(dtype) if opened.beside else 0,
    )
    decided = plan(settings, sizes, shape, hardware)
    log.info("plan: %s on %s: %s", entry.name, hardware.name, decided.describe())
    recipe = _recipe(settings, entry, hardware, dtype, found, opened, decided)
    numbers.tell(dtype, recipe.compute, int8_attention=recipe.int8_attention)

    def start(decided: Plan) -> Model:
        return _start(recipe, decided, cold_start, first_edit)

    try:
        try:
            return start(decided)
        except (torch.OutOfMemoryError, OutOfMemory):
            if settings.cpu_offload != "auto":
                raise
            log.warning("%s does not fit after all: trying again with less of it", entry.name)
        release()
        least = settings.model_copy(
            update={"cpu_offload": "stream", "precision_mode": decided.precision}
        )
        return start(plan(least, sizes, shape, hardware))
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        raise DoesNotFit(
            f"the card ran out of memory while starting at {decided.precision}; "
            "choose a smaller PRECISION_MODE or CPU_OFFLOAD=stream, or free the card"
        ) from error


def _recipe(
    settings: Settings,
    entry: ModelEntry,
    hardware: Hardware,
    dtype: torch.dtype,
    found: Sources,
    opened: Opened,
    decided: Plan,
) -> Recipe:
    transformer = opened.checkpoints.get(components.TRANSFORMER.name)
    precision = _transformers_precision(settings, decided, transformer)
    return Recipe(
        settings,
        entry,
        found.folder,
        () if opened.beside else found.loras,
        hardware.device,
        dtype,
        numbers.choose_products(settings, precision, hardware, dtype),
        numbers.attends_in_int8(settings, hardware, dtype),
        is_complete=found.is_complete,
        checkpoints=opened.checkpoints,
        beside=opened.beside,
        ranges=opened.ranges,
    )


def _label(checkpoint: Checkpoint | Wide | None, decided: Plan) -> str:
    found = in_own_format(checkpoint)
    return found.label if found else decided.precision


def _transformers_precision(
    settings: Settings, decided: Plan, checkpoint: Checkpoint | Wide | None
) -> Precision:
    """What its products are chosen by."""
    found = in_own_format(checkpoint)
    if found is not None:
        return from_checkpoint.like(found)
    return decided.precision if settings.quantize_components == "all" else "bf16"


def _start(
    recipe: Recipe,
    decided: Plan,
    cold_start: ColdStart,
    first_edit: Callable[[Model], None] | None,
) -> Model:
    """Loads as planned, tries the model, and keeps its weights for the next start."""
    store = Store(recipe, decided)
    try:
        model = _load(recipe, store, decided, cold_start)
    finally:
        store.close()
    if first_edit is not None:
        with cold_start.step("first edit"):
            first_edit(model)
    if store.is_to_write(model):
        with cold_start.step("prepare"):
            store.write(model)
    cold_start.prepared = store.is_there
    cold_start.finish()
    return model


def _load(recipe: Recipe, store: Store, decided: Plan, cold_start: ColdStart) -> Model:
    entry, folder, settings = recipe.entry, recipe.folder, recipe.settings
    lightning = checkpoints.lightning_of(settings) or (
        settings.lightning_steps if settings.use_lightning_lora else None
    )

    def load(component: Component) -> nn.Module:
        with cold_start.step(f"load {component.name}"):
            return store.read(component) or load_placed(recipe, component, decided)

    vae = load(components.VAE)
    with libraries.loading(recipe, decided, vae):
        text_encoder, transformer = load(components.TEXT_ENCODER), load(components.TRANSFORMER)
    scheduler = in_folder.read_json(folder / "scheduler" / "scheduler_config.json")
    processor = folder / "processor" / "preprocessor_config.json"
    return Model(
        entry=entry,
        plan=decided,
        weights=_label(recipe.checkpoint_of(components.TRANSFORMER), decided),
        device=recipe.device,
        dtype=recipe.dtype,
        lightning_steps=lightning,
        sampler=LIGHTNING_SAMPLER if lightning else Sampler.from_config(scheduler),
        tokenizer=TextTokenizer(folder / "tokenizer"),
        # A model that takes no pictures has no such file, and never asks.
        patching=read_patching(in_folder.read_json(processor) if entry.max_images else {}),
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        cold_start=cold_start,
        encodings=Remembered(settings.remember_mb * 10**6),
        adapters=Kept(settings.lora_cache_mb * 10**6),
    )
