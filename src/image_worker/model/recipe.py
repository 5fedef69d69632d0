"""What is built, and how one component of it becomes what serves."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_worker.catalog import ModelEntry
from image_worker.compute import Compute
from image_worker.errors import InvalidSettings
from image_worker.model import components, from_checkpoint, in_folder, weights
from image_worker.model.attention import Int8
from image_worker.model.beside import Beside
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.components import Component
from image_worker.model.lora import Lora
from image_worker.model.modulation import Read
from image_worker.model.opening import in_own_format
from image_worker.model.ranges import NO_RANGES, Ranges
from image_worker.model.transformer import ROUND_TO, Transformer
from image_worker.model.wide import Wide
from image_worker.settings import Precision, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What is built, where from and in which type: everything but where it will lie.

    loras: files to merge into the transformer; compute: what it multiplies weights in few bits in;
    int8_attention: it attends in int8; is_complete: all files are there, not just the small ones;
    checkpoints: files that components' weights are in instead of the folder's, by the components'
    names; beside: LoRAs that are not merged, because those weights are in a format of their own;
    ranges: of the transformer's activations.
    """

    settings: Settings
    entry: ModelEntry
    folder: Path
    loras: tuple[Path, ...]
    device: torch.device
    dtype: torch.dtype
    compute: Compute = "bf16"
    int8_attention: bool = False
    is_complete: bool = True
    checkpoints: Mapping[str, Checkpoint | Wide] = field(default_factory=dict)
    beside: Beside | None = None
    ranges: Ranges = NO_RANGES

    def checkpoint_of(self, component: Component) -> Checkpoint | Wide | None:
        """The file that this component's weights are in, if not in the folder's."""
        return self.checkpoints.get(component.name)

    def storage(self, component: Component, precision: Precision) -> weights.Storage:
        """How this component's weights are kept."""
        return component.storage(precision, self.settings, self.dtype, self.ranges.layers)


class Incomplete(Exception):
    """There are no prepared weights after all, and so files are needed that are not there."""


def read_component(
    recipe: Recipe,
    component: Component,
    precision: Precision,
    *,
    whole: bool = False,
    away: Set[str] = frozenset(),
) -> nn.Module:
    """A component as its checkpoint has it, with its weights, the transformer's LoRAs merged.

    whole: with the layers that serve from disk, too; away: units that are on the host, not on the
    device.

    Raises:
        Incomplete: its checkpoint is not there.
    """
    if not recipe.is_complete:
        raise Incomplete
    folder = recipe.folder / component.name
    module = component.empty(folder)
    storage = recipe.storage(component, precision)
    if whole:
        storage = dataclasses.replace(storage, on_disk=lambda _: False)

    def stays(name: str) -> bool:
        return not component.on_host(name) and component.unit(name) not in away

    single = recipe.checkpoint_of(component)
    if own := in_own_format(single):
        from_checkpoint.load(module, own, storage, recipe.device, stays)
        return module
    if isinstance(single, Wide):
        tensors = single.tensors(recipe.device, storage)
    else:
        found = in_folder.weight_files(folder)
        tensors = weights.read(found, component.name, component.rename, component.cut)
    is_changed = component is components.TRANSFORMER
    weights.load(
        module,
        tensors,
        storage,
        recipe.device,
        loras=[Lora.read(path) for path in recipe.loras] if is_changed else (),
        label=component.name,
        stays=stays,
    )
    return module


def empty_component(recipe: Recipe, component: Component, precision: Precision) -> nn.Module:
    """What `read_component` makes, without any tensor."""
    module = component.empty(recipe.folder / component.name)
    storage = recipe.storage(component, precision)
    if own := in_own_format(recipe.checkpoint_of(component)):
        from_checkpoint.empty(module, own, storage)
    else:
        weights.empty(module, storage)
    return module


def as_served(
    recipe: Recipe, component: Component, module: Any, layers: Read | None = None
) -> nn.Module:
    """`module`, as its checkpoint has it, in the form that serves.

    layers: reads the transformer's modulation; None: it is read from the checkpoint.
    """
    if component is components.TRANSFORMER:
        module = _served(recipe, module, layers or modulation_layers(recipe))
    served: nn.Module = module.eval()
    return served


def _served(recipe: Recipe, source: Any, layers: Read) -> Transformer:
    cache = keep_kernels(recipe.settings) if recipe.device.type == "cuda" else None
    attention = None
    if recipe.int8_attention:
        try:
            attention = Int8(recipe.device, cache)
        except Exception as error:  # of CUDA's packages, which have no kind of their own
            raise InvalidSettings(
                f"attention in int8 does not run here ({error}); set ATTENTION=bf16 to go without"
            ) from error
    return Transformer(
        source,
        recipe.device,
        recipe.dtype,
        round_to=ROUND_TO[recipe.compute],
        attention=attention,
        read=layers,
        beside=recipe.beside,
    )


def modulation_layers(recipe: Recipe) -> Read:
    """The layers that stay on disk."""
    single = recipe.checkpoint_of(components.TRANSFORMER)
    if own := in_own_format(single):
        return from_checkpoint.layers(own, recipe.device, recipe.dtype)
    loras = [Lora.read(path, only=components.is_modulation) for path in recipe.loras]
    if isinstance(single, Wide):
        return single.layers(loras, recipe.device, recipe.dtype)
    folder = recipe.folder / components.TRANSFORMER.name
    return weights.Layers(in_folder.weight_files(folder), loras, recipe.dtype)


def keep_kernels(settings: Settings) -> Path | None:
    """Has Triton keep compiled kernels beside the weights, where the next start finds them.

    Returns the folder for kernels that are not Triton's, or None where nothing can be written.
    """
    import tempfile

    import triton

    folder = settings.model_dir / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        log.info("compiled kernels are not kept: %s", error)
        return None
    usual = Path.home() / ".triton" / "cache"
    if Path(triton.knobs.cache.dir) == usual:  # nobody chose another one
        triton.knobs.cache.dir = str(folder / "triton")
    return folder / "cuda"
