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

from image_worker.model.components import is_modulation
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.fp8 import Fp8Linear
from image_worker.model.lora import Lora, LoraPair
from image_worker.model.low_rank import (
    Change,
    Changes,
    LowRank,
    Reads,
    RoundedChange,
    Scaled,
    low_rank,
    padded,
)
from image_worker.model.shapes import BLOCK
from image_worker.model.skeleton import Skeleton

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
# By layer: its product, and which of the two streams it is for.
_PLACES = {
    layer: (product, stream)
    for product, streams in PRODUCTS.items()
    for stream, layers in enumerate(streams)
    for layer in layers
}
_OUTSIDE = ("img_in", "txt_in", "proj_out")
_TIMESTEP = "time_text_embed."  # what embeds it


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
        reads: Sequence[Reads],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Adapter:
        """key: the same for equal LoRAs and scales only; reads: as of `Transformer`, of each block;
        dtype: what is computed in.

        LoRAs have passed `check`.

        Raises:
            ModelMismatch: values that dtype cannot hold.
            torch.OutOfMemoryError: the device cannot hold it.
        """

        def joined(*names: str) -> LowRank | None:
            return low_rank(names, loras, device, dtype)

        def change(number: int, product: str) -> Change | RoundedChange:
            prefix = f"transformer_blocks.{number}."
            streams = (joined(*(prefix + n for n in names)) for names in PRODUCTS[product])
            found, round_to = Change(*streams), reads[number][product]
            return RoundedChange.of(found, round_to) if found.nbytes and round_to else found

        outside = {name: joined(name) for name in _OUTSIDE}
        return cls(
            tuple(
                Changes(*(change(number, product) for product in PRODUCTS))
                for number in range(len(reads))
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
        return sum(part.nbytes for part in (*changes, *self.outside.values()))


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
    """At most what their adapter takes on its device, but for scales of rounded numbers.

    Where inputs are rounded both streams have the ranks of the one that has more.
    """
    ups, alone = 0, 0
    ranks: dict[str, list[int]] = {}  # of a product's two streams
    columns: dict[str, int] = {}
    for lora, _ in loras:
        for name, pair in lora.pairs.items():
            if is_of_timestep(name):
                continue
            ups += pair.up.numel()
            in_block = BLOCK.fullmatch(name)
            if in_block is None:
                alone += pair.down.numel()
                continue
            product, stream = _PLACES[in_block[2]]
            place = f"{in_block[1]}.{product}"
            ranks.setdefault(place, [0, 0])[stream] += len(pair.down)
            columns[place] = pair.down.shape[1]
    downs = sum(2 * padded(max(found)) * columns[product] for product, found in ranks.items())
    return dtype.itemsize * (ups + alone + downs)
