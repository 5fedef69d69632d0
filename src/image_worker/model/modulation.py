"""What the transformer does with its timestep, as tables: a third of its weights off the card.

Every block turns the timestep, and nothing else, into shifts, scales and gates for its tokens. A
schedule has few timesteps, so these are computed once for each of them, with the layers that the
stock module would run at every step. The layers themselves stay where they are: on disk.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from image_worker.model.adapters import Timestep
from image_worker.model.embeddings import embed_timestep

KEPT = 64  # tables that nobody uses; 4.2 MiB each in the full model
_READERS = 4  # threads that read layers, each one ahead
_Key = tuple[float, Hashable]  # a timestep, and of which LoRAs; None: of none
Read = Callable[[str], tuple[Tensor, Tensor]]  # a layer's weight and bias, by its name


class Modulation:
    """Tables by timestep and LoRAs: those that somebody holds, and the ones used last.

    layers: linear ones, by their names; dtype: what is computed in; read: gives a layer's weight
    (out, in) and bias (out), by its name.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        read: Read | None = None,
        beside: Timestep | None = None,
    ) -> None:
        """Takes the layers out of `model`, a `Skeleton` or diffusers' module.

        read: reads them, where `model` has them without weights; beside: what the LoRAs of all jobs
        change of them.
        """
        self._embedder = model.time_text_embed.timestep_embedder
        self._device, self.dtype, self._beside = device, dtype, beside
        blocks = model.transformer_blocks
        self._width = model.norm_out.linear.in_features
        layers = {
            f"transformer_blocks.{number}.{name}.1": getattr(block, name)[1]
            for number, block in enumerate(blocks)
            for name in ("txt_mod", "img_mod")
        } | {"norm_out.linear": model.norm_out.linear}
        self.layers = layers
        self.read = read or (lambda name: (layers[name].weight, layers[name].bias))
        for block in blocks:
            del block.txt_mod, block.img_mod
        del model.norm_out
        self._tables: WeakValueDictionary[_Key, Tensor] = WeakValueDictionary()
        self._recent: OrderedDict[_Key, Tensor] = OrderedDict()
        self._blocks = len(blocks)

    def tables(self) -> dict[float, Tensor]:
        """Those without LoRAs of a job that were used last, by timestep.

        (blocks · 12 + 2) · width numbers each.
        """
        return {level: table for (level, lora), table in self._recent.items() if lora is None}

    def put(self, tables: Mapping[float, Tensor]) -> None:
        """Takes tables that were made before, on the device."""
        for level, table in tables.items():
            self._tables[level, None] = self._recent[level, None] = table

    def prepare(self, timesteps: Sequence[float], changed: Timestep | None = None) -> list[Tensor]:
        """The tables of those timesteps, in [0, 1]. While they are held, no step waits for them.

        changed: what a job's LoRAs change of the layers, on top of those of all jobs.
        """
        key = changed.key if changed else None
        found: dict[float, Tensor] = {}
        for level in timesteps:
            table = self._tables.get((level, key))
            if table is not None:
                found[level] = table
        missing = [level for level in dict.fromkeys(timesteps) if level not in found]
        found |= self._make(missing, changed)
        for level, table in found.items():
            self._tables[level, key] = self._recent[level, key] = table
            self._recent.move_to_end((level, key))
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)
        return list(found.values())

    @torch.inference_mode()
    def _make(self, levels: Sequence[float], changed: Timestep | None) -> dict[float, Tensor]:
        """In one pass over the layers."""
        if not levels:
            return {}
        # The transformer may be off the card just now, and these few layers with it.
        embedder = copy.deepcopy(self._embedder).to(self._device)
        changes = [one for one in (self._beside, changed) if one]
        for one in changes:
            one.merge_embedder(embedder)
        embedded = [self._embedding(embedder, level) for level in levels]
        parts: list[list[Tensor]] = [[] for _ in levels]
        for name, layer in zip(self.layers, self._each_layer(), strict=True):
            weight, bias = (tensor.to(self._device, self.dtype) for tensor in layer)
            for one in changes:
                weight = one.merge(name, weight)
            for found, vector in zip(parts, embedded, strict=True):
                found.append(functional.linear(vector, weight, bias)[0])
        return {level: torch.cat(found) for level, found in zip(levels, parts, strict=True)}

    def _each_layer(self) -> Iterator[tuple[Tensor, Tensor]]:
        """In order. A few are read ahead, and no more, since all of them are 13.6 GB."""
        ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
        with ThreadPoolExecutor(_READERS) as readers:
            for name in self.layers:
                ahead.append(readers.submit(self.read, name))
                if len(ahead) > _READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def of_blocks(
        self, streams: Iterable[tuple[float, int]], changed: Timestep | None = None
    ) -> Tensor:
        """(M, blocks, 6, width): shift, scale and gate before attention, and the same after it.

        streams: M timesteps, each with 0 for prompts or 1 for pictures.
        """
        found = []
        for level, stream in streams:
            tables = self._table(level, changed)[: -2 * self._width]
            found.append(tables.view(self._blocks, 2, 6, self._width)[:, stream])
        return torch.stack(found)

    def of_output(self, timesteps: Iterable[float], changed: Timestep | None = None) -> Tensor:
        """(M, 2, width): scale and shift before the last layer."""
        found = [self._table(level, changed)[-2 * self._width :] for level in timesteps]
        return torch.stack(found).view(-1, 2, self._width)

    def _table(self, level: float, changed: Timestep | None) -> Tensor:
        return self.prepare([level], changed)[0]

    def _embedding(self, embedder: Any, level: float) -> Tensor:
        """(1, width), of a timestep that is rounded as 0..1000, as in the stock pipeline."""
        timestep = torch.tensor([1000 * level], device=self._device).to(self.dtype) / 1000
        return functional.silu(embed_timestep(embedder, timestep))
