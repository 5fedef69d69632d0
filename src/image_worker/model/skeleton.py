"""The transformer's parameters, under the names that they have in diffusers' checkpoints.

Only a place to load them to: it has no forward. `transformer.py` takes it apart and computes.
"""

from __future__ import annotations

from torch import nn

from image_worker.model.configs import TransformerConfig
from image_worker.model.embeddings import SINUSOIDS


class Linear(nn.Linear):
    """Without random values to begin with: in the full model's 846 layers they take a second."""

    def reset_parameters(self) -> None:
        """Leaves them as they are: all are loaded."""


class Norm(nn.RMSNorm):
    """Without values to begin with, too."""

    def reset_parameters(self) -> None:
        """Leaves them as they are."""


class Skeleton(nn.Module):
    """The tree of modules of a `QwenImageTransformer2DModel`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.img_in = Linear(config.in_channels, width)
        self.txt_norm = Norm(config.joint_attention_dim)
        self.txt_in = Linear(config.joint_attention_dim, width)
        embedder = {"linear_1": Linear(SINUSOIDS, width), "linear_2": Linear(width, width)}
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        self.transformer_blocks = nn.ModuleList(
            _block(width, config.attention_head_dim) for _ in range(config.num_layers)
        )
        self.norm_out = nn.ModuleDict({"linear": Linear(width, 2 * width)})
        self.proj_out = Linear(width, config.in_channels)


def _block(width: int, head: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "img_mod": _modulation(width),
            "txt_mod": _modulation(width),
            "attn": _attention(width, head),
            "img_mlp": _mlp(width),
            "txt_mlp": _mlp(width),
        }
    )


def _modulation(width: int) -> nn.ModuleList:
    """Shift, scale and gate, twice. Upstream has an activation in the first place."""
    return nn.ModuleList([nn.Identity(), Linear(width, 6 * width)])


def _attention(width: int, head: int) -> nn.ModuleDict:
    """Of pictures, and with "add" in the name of prompts."""
    parts: dict[str, nn.Module] = {
        name: Linear(width, width)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    parts["to_out"] = nn.ModuleList([Linear(width, width)])
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        parts[name] = Norm(head)
    return nn.ModuleDict(parts)


def _mlp(width: int) -> nn.ModuleDict:
    """Between its two layers upstream has dropout."""
    layers = [
        nn.ModuleDict({"proj": Linear(width, 4 * width)}),
        nn.Identity(),
        Linear(4 * width, width),
    ]
    return nn.ModuleDict({"net": nn.ModuleList(layers)})
