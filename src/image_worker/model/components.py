"""The three components of a checkpoint: class, tensor names, and which layers are quantised.

Left in full precision is what is small and feels rounding most: input and output layers, the
vision tower, the VAE. The transformer's modulation is, too, and stays off the card. Libraries are
imported when a module is made, not before (`build.py` says why).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_worker.catalog import ModelEntry
from image_worker.errors import ModelMismatch
from image_worker.model import files, weights
from image_worker.model.configs import PATCH, VAE_SCALE, TransformerConfig, VaeConfig
from image_worker.model.formats import FORMATS
from image_worker.model.placement import Shape, Sizes
from image_worker.model.skeleton import Skeleton
from image_worker.model.vae import Vae, checkpoint_name, last_frame
from image_worker.settings import Precision, Settings


@dataclass(frozen=True)
class Component:
    """One folder of a checkpoint.

    kind: the class that its configuration must name; empty(folder): the module, its parameters on
    the meta device; rename: the module's name for a checkpoint's tensor, None if it is not needed;
    cut: what is needed of a checkpoint's tensor, None for all; quantised, on_disk: whether the
    linear layer of a name is; blocks: the list that most of the weights are in, as it is called in
    the module that serves.
    """

    name: str
    kind: str
    empty: Callable[[Path], nn.Module]
    rename: weights.Rename = lambda name: name
    cut: weights.Cut | None = None
    quantised: Callable[[str], bool] = lambda path: False  # noqa: ARG005
    on_disk: Callable[[str], bool] = lambda path: False  # noqa: ARG005
    blocks: str | None = None

    def storage(
        self, precision: Precision, settings: Settings, dtype: torch.dtype
    ) -> weights.Storage:
        """How this component's weights are kept."""
        everything = settings.quantize_components == "all"
        form = FORMATS[precision] if everything or self.name == "text_encoder" else None
        return weights.Storage(dtype, form, self.quantised, self.on_disk)


def text_encoder_name(name: str) -> str | None:
    """The name in `Qwen2_5_VLModel` of a tensor of either published layout; None: not needed.

    Only hidden states are used, so the language model's output layer stays on disk.
    """
    if name.startswith("lm_head."):
        return None
    bare = name.removeprefix("model.")
    if bare.startswith(("visual.", "language_model.")):
        return bare
    return f"language_model.{bare}"


def _empty_text_encoder(folder: Path) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    return _on_meta(lambda: Qwen2_5_VLModel(Qwen2_5_VLConfig.from_pretrained(folder)))


def _empty_transformer(folder: Path) -> nn.Module:
    config = TransformerConfig.parse(files.read_json(folder / "config.json"))
    with torch.device("meta"):
        return Skeleton(config)


def _empty_vae(folder: Path) -> nn.Module:
    config = VaeConfig.parse(files.read_json(folder / "config.json"))
    with torch.device("meta"):
        return Vae(config)


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def is_modulation(path: str) -> bool:
    """Whether the transformer's layer of that name sees nothing but the timestep."""
    return ".img_mod." in path or ".txt_mod." in path or path == "norm_out.linear"


TEXT_ENCODER = Component(
    "text_encoder",
    kind="Qwen2_5_VLForConditionalGeneration",
    empty=_empty_text_encoder,
    rename=text_encoder_name,
    quantised=lambda path: path.startswith("language_model.layers."),
    blocks="language_model.layers",
)
TRANSFORMER = Component(
    "transformer",
    kind="QwenImageTransformer2DModel",
    empty=_empty_transformer,
    quantised=lambda path: path.startswith("transformer_blocks.") and not is_modulation(path),
    on_disk=is_modulation,
    blocks="blocks",
)
VAE = Component(
    "vae",
    kind="AutoencoderKLQwenImage",
    empty=_empty_vae,
    rename=checkpoint_name,
    cut=last_frame,
)
ALL = (TEXT_ENCODER, TRANSFORMER, VAE)


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Each component's configuration.

    Raises:
        ModelMismatch: one is of another class than this worker runs.
    """
    configs = {}
    for component in ALL:
        config = configs[component.name] = files.read_json(folder / component.name / "config.json")
        kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
        if kind != component.kind:
            raise ModelMismatch(
                f"{component.name} of the model is a {kind}; this worker runs {component.kind}"
            )
    return configs


def sizes(folder: Path, settings: Settings, dtype: torch.dtype) -> dict[Precision, Sizes]:
    """What each component's weights would take, in bytes, at each precision."""

    def size(component: Component, precision: Precision) -> int:
        storage = component.storage(precision, settings, dtype)
        found = files.weight_files(folder / component.name)
        return weights.stored_bytes(found, storage, component.rename, component.cut)

    return {
        precision: Sizes(**{component.name: size(component, precision) for component in ALL})
        for precision in FORMATS
    }


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
