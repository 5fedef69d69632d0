"""What the transformer does with its timestep, as tables: a third of its weights off the card.

Every block turns the timestep, and nothing else, into shifts, scales and gates for its tokens. A
schedule has few timesteps, so these are computed once for each of them, with the layers that the
stock module would run at every step; the layers themselves wait in the host's memory or, mapped
from the checkpoint's file, on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

KEPT = 128  # timesteps; 4.2 MiB each in the full model


class Modulation:
    """Tables by timestep, the ones used last."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Takes the layers out of `model`, a `QwenImageTransformer2DModel`."""
        self._embed = model.time_text_embed
        self._device, self._dtype = device, dtype
        blocks = model.transformer_blocks
        self._layers = [layer for block in blocks for layer in (block.txt_mod[1], block.img_mod[1])]
        self._layers.append(model.norm_out.linear)
        for block in blocks:
            del block.txt_mod, block.img_mod
        del model.norm_out
        self._tables: OrderedDict[float, Tensor] = OrderedDict()
        self._blocks = len(blocks)
        self._width = self._layers[-1].in_features

    @torch.inference_mode()
    def prepare(self, timesteps: Iterable[float]) -> None:
        """Computes the tables of those timesteps, in [0, 1], that are not there: in one pass."""
        missing = [level for level in dict.fromkeys(timesteps) if level not in self._tables]
        if not missing:
            return
        embedded = [self._embedding(level) for level in missing]
        parts: list[list[Tensor]] = [[] for _ in missing]
        for layer in self._layers:
            weight, bias = (
                tensor.to(self._device, self._dtype) for tensor in (layer.weight, layer.bias)
            )
            for found, vector in zip(parts, embedded, strict=True):
                found.append(functional.linear(vector, weight, bias)[0])
        for level, found in zip(missing, parts, strict=True):
            self._tables[level] = torch.cat(found)
        while len(self._tables) > max(KEPT, len(missing)):
            self._tables.popitem(last=False)

    def of_blocks(self, streams: Iterable[tuple[float, int]]) -> Tensor:
        """(M, blocks, 6, width): shift, scale and gate before attention, and the same after it.

        streams: M timesteps, each with 0 for prompts or 1 for pictures.
        """
        found = []
        for level, stream in streams:
            tables = self._table(level)[: -2 * self._width]
            found.append(tables.view(self._blocks, 2, 6, self._width)[:, stream])
        return torch.stack(found)

    def of_output(self, timesteps: Iterable[float]) -> Tensor:
        """(M, 2, width): scale and shift before the last layer."""
        found = [self._table(level)[-2 * self._width :] for level in timesteps]
        return torch.stack(found).view(-1, 2, self._width)

    def _table(self, level: float) -> Tensor:
        self.prepare([level])
        self._tables.move_to_end(level)
        return self._tables[level]

    def _embedding(self, level: float) -> Tensor:
        """(1, width), of a timestep that is rounded as 0..1000, as in the stock pipeline."""
        timestep = torch.tensor([1000 * level], device=self._device).to(self._dtype) / 1000
        like = torch.empty(0, device=self._device, dtype=self._dtype)
        return functional.silu(self._embed(timestep, like))
