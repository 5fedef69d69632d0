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
from image_worker.model.formats import FORMATS
from image_worker.model.placement import Shape, Sizes
from image_worker.model.text_encoder import TextEncoder
from image_worker.settings import Precision, Settings


@dataclass(frozen=True)
class Component:
    """One folder of a checkpoint.

    kind: the class that its configuration must name; empty(folder): the module, its parameters on
    the meta device; rename: the module's name for a checkpoint's tensor, None if it is not needed;
    quantised, on_disk: whether the linear layer of a name is; blocks: the list that most of the
    weights are in, as it is called in the module that serves.
    """

    name: str
    kind: str
    empty: Callable[[Path], nn.Module]
    rename: Callable[[str], str | None] = lambda name: name
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
        return TextEncoder(files.read_json(folder / "config.json"))


def _empty_transformer(folder: Path) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel as Kind

    return _on_meta(lambda: Kind.from_config(Kind.load_config(folder)))


def _empty_vae(folder: Path) -> nn.Module:
    from image_worker.model.vae import PictureVae as Kind

    return _on_meta(lambda: Kind.from_config(Kind.load_config(folder)))


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
VAE = Component("vae", kind="AutoencoderKLQwenImage", empty=_empty_vae)
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
        return weights.stored_bytes(found, storage, component.rename)

    return {
        precision: Sizes(**{component.name: size(component, precision) for component in ALL})
        for precision in FORMATS
    }


def shape(entry: ModelEntry, configs: dict[str, dict[str, Any]]) -> Shape:
    """What working memory depends on: the model's widths, and a job with one reference."""
    transformer = configs["transformer"]
    tokens_per_picture = entry.area // 256  # 8× by the VAE and 2× by packing, per side
    pictures = 2 if entry.max_images else 1
    return Shape(
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        zero_cond_t=bool(transformer.get("zero_cond_t", False)),
        vae_base=configs["vae"]["base_dim"],
        tokens=pictures * tokens_per_picture + 256,
        pixels=entry.area,
    )
