"""What is read of the transformer's and the VAE's `config.json`, under the names that it has there.

Options that upstream does not know, either, are ignored: it ignores them, too, and published files
have some. An option with a value that is not implemented is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from image_worker.errors import ModelMismatch

VAE_SCALE = 8  # pixels per latent and side
PATCH = 2  # latents per token and side
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class TransformerConfig:
    """Of a `QwenImageTransformer2DModel`.

    joint_attention_dim: the prompt's width; in_channels: of a token of latents, in and out;
    axes_dims_rope: how many of a head's numbers turn with a token's picture, row and column;
    zero_cond_t: references are modulated as if their timestep were 0.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    in_channels: int
    axes_dims_rope: tuple[int, int, int]
    zero_cond_t: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From what the file holds.

        Raises:
            ModelMismatch: an option is missing, malformed, or has a value that is not implemented.
        """
        try:
            frames, rows, columns = (int(size) for size in config["axes_dims_rope"])
            found = cls(
                num_layers=int(config["num_layers"]),
                num_attention_heads=int(config["num_attention_heads"]),
                attention_head_dim=int(config["attention_head_dim"]),
                joint_attention_dim=int(config["joint_attention_dim"]),
                in_channels=int(config["in_channels"]),
                axes_dims_rope=(frames, rows, columns),
                zero_cond_t=bool(config.get("zero_cond_t", False)),
            )
        except _MALFORMED as error:
            raise ModelMismatch(f"the transformer's configuration is damaged: {error!r}") from error
        implemented = {
            "patch_size": PATCH,
            "out_channels": found.in_channels // PATCH**2,
            "guidance_embeds": False,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
        }
        _refuse_others("transformer", config, implemented)
        sizes = found.axes_dims_rope
        if sum(sizes) != found.attention_head_dim or any(size % 2 for size in sizes):
            raise ModelMismatch(
                f"axes_dims_rope of the transformer is {sizes}; this worker takes even sizes whose "
                f"sum is attention_head_dim, {found.attention_head_dim}"
            )
        return found

    @property
    def width(self) -> int:
        """Of a token inside."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VaeConfig:
    """Of an `AutoencoderKLQwenImage`.

    base_dim: channels at full size; z_dim: of latents; dim_mult: channels at each size over those
    at full size; latents_mean, latents_std: of each of the latents' channels.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    input_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> VaeConfig:
        """From what the file holds.

        Raises:
            ModelMismatch: an option is missing, malformed, or has a value that is not implemented.
        """
        try:
            found = cls(
                base_dim=int(config["base_dim"]),
                z_dim=int(config["z_dim"]),
                dim_mult=tuple(int(factor) for factor in config["dim_mult"]),
                num_res_blocks=int(config["num_res_blocks"]),
                input_channels=int(config.get("input_channels", 3)),
                latents_mean=tuple(float(value) for value in config["latents_mean"]),
                latents_std=tuple(float(value) for value in config["latents_std"]),
            )
        except _MALFORMED as error:
            raise ModelMismatch(f"the VAE's configuration is damaged: {error!r}") from error
        _refuse_others("VAE", config, {"attn_scales": []})
        if 2 ** (len(found.dim_mult) - 1) != VAE_SCALE:
            raise ModelMismatch(
                f"dim_mult of the VAE is {found.dim_mult}; this worker takes four factors, which "
                f"make latents of {VAE_SCALE} pixels each way"
            )
        if not len(found.latents_mean) == len(found.latents_std) == found.z_dim:
            raise ModelMismatch(
                f"latents_mean and latents_std of the VAE are of {len(found.latents_mean)} and "
                f"{len(found.latents_std)} channels, but z_dim is {found.z_dim}"
            )
        return found


def _refuse_others(
    component: str, config: Mapping[str, Any], implemented: Mapping[str, Any]
) -> None:
    for name, value in implemented.items():
        found = config.get(name, value)
        if found != value:
            raise ModelMismatch(
                f"{name} of the {component} is {found!r}; this worker runs {value!r} only"
            )
