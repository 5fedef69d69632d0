"""What trainers call a LoRA's tensors, and where they write down its scales.

The names are those that diffusers' loader of Qwen-Image knows: peft's, older diffusers', kohya's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["down", "up", "alpha"]

# What stands before the transformer's own names, in any combination.
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
# The same before names whose dots became underscores.
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")

_KEY = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<down>lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight"
    r"|(?P<up>lora_up|lora_B|lora\.up)(?:\.\w+)?\.weight"
    r"|(?P<alpha>alpha))"
)
_ROLES: tuple[Role, ...] = ("down", "up", "alpha")

# The linear layers of a block, and those outside of blocks.
IN_BLOCK = (
    *("img_mod.1", "txt_mod.1"),
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
)
OUTSIDE = (
    *("img_in", "txt_in", "proj_out", "norm_out.linear"),
    *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
)
_FLAT_IN_BLOCK = {name.replace(".", "_"): name for name in IN_BLOCK}
_FLAT_OUTSIDE = {name.replace(".", "_"): name for name in OUTSIDE}
_FLAT_BLOCK = re.compile(r"transformer_blocks_(?P<number>\d+)_(?P<layer>\w+)")

# Other ways to change weights, by parts of their tensors' names.
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "lora_mid": "LoRA of convolutions",
    "qweight": "a whole transformer in nunchaku's format",
    "diff": "changes of whole weights or biases",
    "diff_b": "changes of whole weights or biases",
}
_OTHER = re.compile(
    r".*\.(?P<name>hada_|lokr_|oft_|lora_mid|qweight|dora_scale|lora_magnitude_vector|"
    r"lora_[AB](?:\.\w+)?\.bias|lora_up\.bias|diff_b|diff)[\w.]*"
)
_METADATA = "lora_adapter_metadata"  # diffusers' name for peft's configuration
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
_LITERAL = re.compile(r"[\w.]+")


def parse(key: str) -> tuple[str, Role] | None:
    """Whose change a tensor is, by the module's name in diffusers, and which part of it."""
    match = _KEY.fullmatch(_without_prefix(key))
    if match is None:
        return None
    return _dotted(match["module"]), next(role for role in _ROLES if match[role])


def other_kind(key: str) -> str | None:
    """What a tensor is known to be a part of, if not of a LoRA."""
    match = _OTHER.fullmatch(key)
    if match is None:
        return None
    name = match["name"]
    return "LoRA with biases" if name.endswith(".bias") else _OTHERS[name]


def _without_prefix(key: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _dotted(module: str) -> str:
    """A name with underscores in place of dots as the model has it; any other as it is."""
    prefix = next((prefix for prefix in _FLAT_PREFIXES if module.startswith(prefix)), None)
    if prefix is None:
        return module
    flat = module.removeprefix(prefix)
    if flat in _FLAT_OUTSIDE:
        return _FLAT_OUTSIDE[flat]
    match = _FLAT_BLOCK.fullmatch(flat)
    if match is None or match["layer"] not in _FLAT_IN_BLOCK:
        return module
    return f"transformer_blocks.{match['number']}.{_FLAT_IN_BLOCK[match['layer']]}"


@dataclass(frozen=True)
class Scales:
    """How peft's configuration scales a LoRA: alpha / rank, or alpha / √rank.

    alphas: of modules whose name is one of these, or ends in one after a dot.
    """

    alpha: float
    alphas: Mapping[str, float]
    by_root: bool

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Scales | None:
        """What a file's metadata says; None: nothing.

        Raises:
            ValueError: it is not understood; says why.
        """
        if _METADATA not in metadata:
            return None
        try:
            config = _of_transformer(json.loads(metadata[_METADATA]))
            if not config:
                return None
            patterns = config["alpha_pattern"] or {}
            alphas = {name: float(alpha) for name, alpha in patterns.items()}
            found = cls(float(config["lora_alpha"]), alphas, bool(config.get("use_rslora")))
        except (*_MALFORMED, RecursionError, OverflowError) as error:
            raise ValueError("its metadata is not peft's") from error
        if config.get("use_dora"):
            raise ValueError("its metadata says that it is a DoRA, not a LoRA")
        if config.get("lora_bias") or config.get("bias", "none") != "none":
            raise ValueError("its metadata says that it changes biases, too")
        if not all(math.isfinite(alpha) for alpha in (found.alpha, *alphas.values())):
            raise ValueError("its metadata has a scale that is no number")
        if not all(_LITERAL.fullmatch(name) for name in alphas):
            raise ValueError("its metadata has patterns in place of modules' names")
        return found

    def of(self, module: str, rank: int) -> float:
        """Of that module's change."""
        named = (a for name, a in self.alphas.items() if f".{module}".endswith(f".{name}"))
        return next(named, self.alpha) / (math.sqrt(rank) if self.by_root else rank)


def _of_transformer(config: Any) -> dict[str, Any]:
    """Its part of what diffusers writes: a configuration for each of a pipeline's models."""
    prefix = "transformer."
    found = {name.removeprefix(prefix): v for name, v in config.items() if name.startswith(prefix)}
    return {"alpha_pattern": None, **found} if found else {}
