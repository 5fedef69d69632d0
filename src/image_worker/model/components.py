"""The three components of a checkpoint: class, tensor names, and which layers are quantised.

Left in full precision is what is small and feels rounding most: input and output layers, the
vision tower, the VAE. The transformer's modulation is, too, and stays off the card. Libraries are
imported when a module is made, not before (`build.py` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from image_worker.catalog import ModelEntry
from image_worker.errors import ModelMismatch
from image_worker.model import from_checkpoint, in_folder, weights
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import PATCH, VAE_SCALE, TransformerConfig, VaeConfig
from image_worker.model.formats import Format, format_of
from image_worker.model.opening import in_own_format
from image_worker.model.packed import HOST, Slot, slots, unit_of
from image_worker.model.placement import Shape, Sizes
from image_worker.model.skeleton import Skeleton
from image_worker.model.stream import Blocks, Held
from image_worker.model.text_encoder import TextEncoder
from image_worker.model.vae import Vae, checkpoint_name, last_frame
from image_worker.model.wide import Wide
from image_worker.settings import Precision, Settings


@dataclass(frozen=True, eq=False)
class Component:
    """One folder of a checkpoint.

    kind: the class that its configuration must name; empty(folder): the module, its parameters on
    the meta device; rename: the module's name for a checkpoint's tensor, None if it is not needed;
    cut: what is needed of a checkpoint's tensor, None for all; quantised, on_disk: whether the
    linear layer of a name is; on_host: whether the tensor of a name never goes to the card; blocks:
    the lists that most of the weights are in, as they are called in the module that serves, and in
    the checkpoint.
    """

    name: str
    kind: str
    empty: Callable[[Path], nn.Module]
    rename: weights.Rename = lambda name: name
    cut: weights.Cut | None = None
    quantised: Callable[[str], bool] = lambda path: False  # noqa: ARG005
    on_disk: Callable[[str], bool] = lambda path: False  # noqa: ARG005
    on_host: Callable[[str], bool] = lambda name: False  # noqa: ARG005
    blocks: Mapping[str, str] = field(default_factory=dict)

    def units(self, module: nn.Module) -> dict[str, list[Slot]]:
        """The slots of a module that serves, by the units that they are kept and moved in."""
        found: dict[str, list[Slot]] = {}
        for slot in slots(module):
            unit = HOST if self.on_host(slot.name) else unit_of(slot.name, self.blocks)
            found.setdefault(f"{self.name}/{unit}", []).append(slot)
        return found

    def unit(self, name: str) -> str:
        """The unit that becomes of a checkpoint's tensor, by its name there."""
        found = unit_of(name, self.blocks.values())
        source, _, number = found.rpartition(".")
        served = {there: here for here, there in self.blocks.items()}
        return f"{self.name}/{served[source]}.{number}" if source else f"{self.name}/{found}"

    def stream(self, module: nn.Module, held: Mapping[str, Held], device: torch.device) -> None:
        """These units of a module that serves pass through the device from now on."""
        for name in self.blocks:
            prefix = f"{self.name}/{name}."
            found = {
                int(unit.removeprefix(prefix)): one
                for unit, one in held.items()
                if unit.startswith(prefix)
            }
            blocks = module.get_submodule(name)
            if found and isinstance(blocks, Blocks):
                blocks.stream(found, device)

    def storage(
        self,
        precision: Precision,
        settings: Settings,
        dtype: torch.dtype,
        ranges: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> weights.Storage:
        """How this component's weights are kept. ranges: by layers, as of `svdq.encode`."""
        applies = settings.quantize_components == "all" or self.name == "text_encoder"

        def form(path: str) -> Format | None:
            if not (applies and self.quantised(path)):
                return None
            return format_of(precision, settings.svdq_rank, ranges.get(path))

        return weights.Storage(dtype, form, self.on_disk)


def text_encoder_name(name: str) -> str | None:
    """The name in `TextEncoder` of a tensor of either published layout; None: not needed.

    Only hidden states are used, so the language model's output layer stays on disk.
    """
    if name.startswith("lm_head."):
        return None
    bare = name.removeprefix("model.")
    if bare.startswith(("visual.", "language_model.")):
        return bare
    return f"language_model.{bare}"


def _empty_text_encoder(folder: Path) -> nn.Module:
    with torch.device("meta"):
        return TextEncoder(in_folder.read_json(folder / "config.json"))


def _empty_transformer(folder: Path) -> nn.Module:
    config = TransformerConfig.parse(in_folder.read_json(folder / "config.json"))
    with torch.device("meta"):
        return Skeleton(config)


def _empty_vae(folder: Path) -> nn.Module:
    config = VaeConfig.parse(in_folder.read_json(folder / "config.json"))
    with torch.device("meta"):
        return Vae(config)


def is_modulation(path: str) -> bool:
    """Whether the transformer's layer of that name sees nothing but the timestep."""
    return ".img_mod." in path or ".txt_mod." in path or path == "norm_out.linear"


TEXT_ENCODER = Component(
    "text_encoder",
    kind="Qwen2_5_VLForConditionalGeneration",
    empty=_empty_text_encoder,
    rename=text_encoder_name,
    quantised=lambda path: path.startswith("language_model.layers."),
    on_host=lambda name: name.startswith("language_model.embed_tokens."),
    blocks={name: name for name in ("language_model.layers", "visual.blocks")},
)
TRANSFORMER = Component(
    "transformer",
    kind="QwenImageTransformer2DModel",
    empty=_empty_transformer,
    quantised=lambda path: path.startswith("transformer_blocks.") and not is_modulation(path),
    on_disk=is_modulation,
    blocks={"blocks": "transformer_blocks"},
)
VAE = Component(
    "vae",
    kind="AutoencoderKLQwenImage",
    empty=_empty_vae,
    rename=checkpoint_name,
    cut=last_frame,
)
ALL = (VAE, TEXT_ENCODER, TRANSFORMER)  # in the order in which a start reads them


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Each component's configuration.

    Raises:
        ModelMismatch: one is of another class than this worker runs.
    """
    configs = {}
    for component in ALL:
        config = configs[component.name] = in_folder.read_json(
            folder / component.name / "config.json"
        )
        kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if kind != component.kind:
            raise ModelMismatch(
                f"{component.name} of the model is a {kind}; this worker runs {component.kind}"
            )
    return configs


def sizes(
    folder: Path,
    settings: Settings,
    dtype: torch.dtype,
    *,
    has_weights: bool = True,
    checkpoints: Mapping[str, Checkpoint | Wide] = MappingProxyType({}),
    beside: int = 0,
) -> dict[Precision, Sizes]:
    """What the model's weights would take, in bytes, at each precision.

    has_weights: the folder's files are there, and say it faster than their configurations;
    checkpoints: files that components' weights are in instead, by the components' names; beside:
    bytes that are on the card with them for good.
    """
    shapes = {}
    for component in ALL:
        in_files = has_weights and component.name not in checkpoints
        shapes[component] = _shapes(folder, component, in_files)

    def stored(component: Component, precision: Precision) -> dict[str, int]:
        storage = component.storage(precision, settings, dtype)
        if own := in_own_format(checkpoints.get(component.name)):
            return from_checkpoint.stored_bytes(shapes[component], own, storage)
        return weights.stored_bytes(shapes[component], storage)

    return {
        precision: _sizes({component: stored(component, precision) for component in ALL}, beside)
        for precision in get_args(Precision)
    }


def _shapes(folder: Path, component: Component, in_files: bool) -> dict[str, torch.Size]:
    here = folder / component.name
    if in_files:
        return weights.shapes(in_folder.weight_files(here), component.rename, component.cut)
    return weights.shapes_of(component.empty(here))


def _sizes(stored: Mapping[Component, Mapping[str, int]], beside: int) -> Sizes:
    """Of each component's tensors, by their names in the checkpoint's modules."""
    rest, blocks = beside, {}
    for component in (TRANSFORMER, TEXT_ENCODER, VAE):  # the blocks of the first stay first
        found: dict[str, int] = {}
        for name, size in stored[component].items():
            if component.on_host(name):
                continue
            unit = unit_of(name, component.blocks.values())
            found[unit] = found.get(unit, 0) + size
        rest += found.get("rest", 0)
        for served, source in component.blocks.items():
            named = sorted(unit for unit in found if unit.startswith(f"{source}."))
            blocks[f"{component.name}/{served}"] = [found[unit] for unit in named]
    return Sizes(rest, blocks)


def shape(entry: ModelEntry, configs: dict[str, dict[str, Any]]) -> Shape:
    """What working memory depends on: the model's widths, and a job with one reference.

    Raises:
        ModelMismatch: a configuration asks for what this worker does not implement.
    """
    transformer = TransformerConfig.parse(configs["transformer"])
    tokens_per_picture = entry.area // (VAE_SCALE * PATCH) ** 2
    pictures = 2 if entry.max_images else 1
    return Shape(
        width=transformer.width,
        zero_cond_t=transformer.zero_cond_t,
        vae_base=VaeConfig.parse(configs["vae"]).base_dim,
        tokens=pictures * tokens_per_picture + 256,
        pixels=entry.area,
    )
