"""LoRAs beside the weights: what a forward adds to its products, whatever format those are in.

Merging would need the weights in full precision, and a copy for every set of LoRAs. Here a product
is followed by two thin ones of its own: `up @ (down @ x)`, scales folded into `up`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.kernels.reference import Activation, Quantised
from image_worker.model.components import is_modulation
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.lora import Lora, LoraPair
from image_worker.model.skeleton import Skeleton

Scaled = tuple[Lora, float]  # a LoRA and what its change is multiplied by

_PIECE = 4096  # tokens whose rounded values are widened at a time

# Of a block's products, the layers for pictures and those for prompts, as checkpoints name them.
PRODUCTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qkv": (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    "out": (("attn.to_out.0",), ("attn.to_add_out",)),
    "up": (("img_mlp.net.0.proj",), ("txt_mlp.net.0.proj",)),
    "down": (("img_mlp.net.2",), ("txt_mlp.net.2",)),
}
_OUTSIDE = ("img_in", "txt_in", "proj_out")
_TIMESTEP = "time_text_embed."  # what embeds it


@dataclass(frozen=True)
class LowRank:
    """What is added to layers that read the same and whose outputs stand side by side.

    down (ranks, in): of all layers and LoRAs; ups: of each layer which of the outputs and of the
    ranks are its own, and (out, rank).
    """

    down: Tensor
    ups: tuple[tuple[slice, slice, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.down.nbytes + sum(up.nbytes for _, _, up in self.ups)

    def add_to(self, into: Tensor, x: Activation) -> None:
        """Into (N, out), which the layers made of x (N, in)."""
        if isinstance(x, Quantised):
            for first in range(0, len(into), _PIECE):
                piece = slice(first, first + _PIECE)
                self.add_to(into[piece], _widened(x, piece))
            return
        low = x @ self.down.t()
        for outputs, ranks, up in self.ups:
            into[:, outputs].addmm_(low[:, ranks], up.t())


@dataclass(frozen=True)
class Change:
    """What is added to a product of both streams; None: nothing."""

    image: LowRank | None = None
    text: LowRank | None = None

    def add_to(self, into: Tensor, x: Activation, text_tokens: int) -> None:
        """Into (N, out), the product of x (N, in), of which the first are prompts' tokens."""
        if self.text is not None and text_tokens:
            self.text.add_to(into[:text_tokens], x[:text_tokens])
        if self.image is not None:
            self.image.add_to(into[text_tokens:], x[text_tokens:])


@dataclass(frozen=True)
class Changes:
    """What is added to the products of a block."""

    qkv: Change
    out: Change
    up: Change
    down: Change


def added(
    product: str, changes: Sequence[Changes], into: Tensor, x: Activation, text_tokens: int
) -> Tensor:
    """`into`, to which all changes of the product of that name were added: as `Change.add_to`."""
    for one in changes:
        getattr(one, product).add_to(into, x, text_tokens)
    return into


class Timestep:
    """What LoRAs change of the layers that see the timestep only: on the host, merged when tables
    are made. Two of the same key change the same.
    """

    def __init__(self, key: Hashable, loras: Iterable[Scaled]) -> None:
        self.key = key
        self._pairs: dict[str, list[tuple[LoraPair, float]]] = {}
        for lora, scale in loras:
            for name, pair in lora.pairs.items():
                if is_of_timestep(name):
                    self._pairs.setdefault(name, []).append((pair, scale))

    def __bool__(self) -> bool:
        return bool(self._pairs)

    @property
    def nbytes(self) -> int:
        """On the host."""
        pairs = (pair for found in self._pairs.values() for pair, _ in found)
        return sum(pair.down.nbytes + pair.up.nbytes for pair in pairs)

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The changed weight of the layer of that name; `weight` itself if nothing changes."""
        found = self._pairs.get(name)
        if not found:
            return weight
        wide = weight.float()
        for pair, scale in found:
            wide = pair.add_to(wide, scale)
        return wide.to(weight.dtype)

    def merge_embedder(self, embedder: nn.Module) -> None:
        """The same, in place, of the layers that embed the timestep, whatever their format."""
        prefix = f"{_TIMESTEP}timestep_embedder."
        for name, layer in list(embedder.named_children()):
            if prefix + name in self._pairs:
                embedder.set_submodule(
                    name, _linear(layer, self.merge(prefix + name, _wide(layer)))
                )


@dataclass(frozen=True, eq=False)
class Adapter:
    """What LoRAs, each with its scale, change in one transformer, on its device.

    blocks: one each; outside: of layers that are in no block; timestep: None where nothing changes.
    """

    blocks: tuple[Changes, ...]
    outside: Mapping[str, LowRank]
    timestep: Timestep | None

    @classmethod
    def of(
        cls,
        key: Hashable,
        loras: Sequence[Scaled],
        blocks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Adapter:
        """key: the same for equal LoRAs and scales only; dtype: what is computed in.

        LoRAs have passed `check`.

        Raises:
            ModelMismatch: values that dtype cannot hold.
            torch.OutOfMemoryError: the device cannot hold it.
        """

        def joined(*names: str) -> LowRank | None:
            return _joined(names, loras, device, dtype)

        def change(number: int, product: str) -> Change:
            prefix = f"transformer_blocks.{number}."
            return Change(*(joined(*(prefix + n for n in names)) for names in PRODUCTS[product]))

        outside = {name: joined(name) for name in _OUTSIDE}
        return cls(
            tuple(
                Changes(*(change(number, product) for product in PRODUCTS))
                for number in range(blocks)
            ),
            {name: found for name, found in outside.items() if found is not None},
            Timestep(key, loras) or None,
        )

    def add_to(self, name: str, into: Tensor, x: Tensor) -> None:
        """Into (N, out), which a layer outside of blocks made of x (N, in)."""
        if name in self.outside:
            self.outside[name].add_to(into, x)

    @property
    def nbytes(self) -> int:
        """On its device."""
        changes = (change for block in self.blocks for change in vars(block).values())
        parts = (part for change in changes for part in (change.image, change.text) if part)
        return sum(part.nbytes for part in (*parts, *self.outside.values()))


def _wide(layer: Any) -> Tensor:
    """A linear layer's weight (out, in) as numbers: float32, or as it is."""
    if isinstance(layer, CodedLinear):
        found = torch.empty(layer.weight.shape, device=next(layer.buffers()).device)
        layer.weight.decode(found)
        return found
    if isinstance(layer, Fp8Linear):
        return layer.weight.float() * layer.scales
    weight: Tensor = layer.weight.detach()
    return weight


def _linear(layer: Any, weight: Tensor) -> nn.Linear:
    """The same layer with another weight (out, in), which is rounded to its bias' type."""
    found = nn.Linear(layer.in_features, layer.out_features, device="meta")
    found.weight = nn.Parameter(weight.to(layer.bias.dtype), requires_grad=False)
    found.bias = layer.bias
    return found


def check(lora: Lora, config: TransformerConfig) -> None:
    """Refuses a LoRA that does not fit a transformer of that architecture.

    Raises:
        ModelMismatch: says what does not fit.
    """
    with torch.device("meta"):
        skeleton = Skeleton(config)
    lora.check_fits(skeleton)


def is_of_timestep(name: str) -> bool:
    """Whether the layer of that name sees the timestep only."""
    return is_modulation(name) or name.startswith(_TIMESTEP)


def card_bytes(loras: Iterable[Scaled], dtype: torch.dtype) -> int:
    """What their adapter takes on its device."""
    return sum(
        (pair.down.numel() + pair.up.numel()) * dtype.itemsize
        for lora, _ in loras
        for name, pair in lora.pairs.items()
        if not is_of_timestep(name)
    )


def _joined(
    names: Sequence[str], loras: Sequence[Scaled], device: torch.device, dtype: torch.dtype
) -> LowRank | None:
    """Of layers of one shape, in the order of their outputs. Put together where it will lie, which
    takes a card no time.
    """
    downs, ups, rank = [], [], 0
    for number, name in enumerate(names):
        pairs = [(lora.pairs[name], scale) for lora, scale in loras if name in lora.pairs]
        if not pairs:
            continue
        up = torch.cat(
            [pair.up.to(device).float() * (pair.scale * scale) for pair, scale in pairs], dim=1
        )
        outputs, own = len(up), up.shape[1]
        ups.append(
            (
                slice(number * outputs, (number + 1) * outputs),
                slice(rank, rank + own),
                _held(name, up, dtype),
            )
        )
        downs += [pair.down.to(device).float() for pair, _ in pairs]
        rank += own
    if not ups:
        return None
    return LowRank(_held(names[0], torch.cat(downs), dtype), tuple(ups))


def _held(name: str, wide: Tensor, dtype: torch.dtype) -> Tensor:
    found = wide.to(dtype)
    if not torch.isfinite(found).all():
        raise ModelMismatch(f"the change of {name} is too large for the type that is computed in")
    return found


def _widened(x: Quantised, piece: slice) -> Tensor:
    return x.values[piece].to(x.dtype).mul_(x.scales[piece])
