"""The text encoder: Qwen2.5-VL's language model over a prompt and the pictures in it.

Computes what transformers' `Qwen2_5_VLModel` computes, under the same parameter names, for what
this worker asks of it: the last hidden states of one prompt with still pictures. It generates
nothing, so there is no cache and no output layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from image_worker.errors import ModelMismatch
from image_worker.model.stream import Blocks
from image_worker.model.text_config import LanguageConfig, read_config
from image_worker.model.text_layers import (
    Embedding,
    GatedMlp,
    Linear,
    RmsNorm,
    Rope,
    frequencies,
    rope,
    turn,
)
from image_worker.model.vision_tower import Grid, VisionTower


class TextEncoder(nn.Module):
    """Both networks. Linear layers may be replaced by quantised ones."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: of config.json.

        Raises:
            ModelMismatch: it asks for something that is not implemented.
        """
        super().__init__()
        self._config, vision = read_config(config)
        self._merge = vision.merge
        self.visual = VisionTower(vision)
        self.language_model = LanguageModel(self._config)

    def forward(
        self, ids: Tensor, patches: Tensor | None = None, grids: Sequence[Grid] = ()
    ) -> Tensor:
        """The last hidden states, normalised: (tokens, width), on the model's device.

        ids (tokens): of the prompt, with as many image tokens as its pictures have; patches
        (patches, values): of all pictures, as `VisionTower` wants them; grids: one for each
        picture. ids and patches are on the CPU: where pictures stand decides on positions, and
        nothing has to wait for the card to tell.

        Raises:
            ModelMismatch: as many image tokens are not there.
        """
        sizes = [(rows // self._merge, columns // self._merge) for rows, columns in grids]
        slots = (ids == self._config.image_token).nonzero()[:, 0]
        needed = sum(rows * columns for rows, columns in sizes)
        if len(slots) != needed:
            raise ModelMismatch(
                f"a prompt has {len(slots)} image tokens where its pictures have {needed}: the "
                "model's text_encoder/, tokenizer/ and processor/ do not belong together"
            )
        weight = self.language_model.norm.weight
        angles = _angles(positions(len(ids), slots, sizes), self._config)
        turns = rope(angles, weight.device, weight.dtype)
        # A gigabyte of which a prompt reads a few rows: it stays on the host.
        hidden = self.language_model.embed_tokens(ids).to(weight.device)
        if patches is not None:
            slots = slots.to(weight.device)  # before the tower: later this would wait for it
            hidden = hidden.index_copy(0, slots, self.visual(patches, grids))
        found: Tensor = self.language_model(hidden, turns)
        return found


class LanguageModel(nn.Module):
    """The decoder's layers."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocabulary, config.width)
        self.layers = Blocks([LanguageLayer(config) for _ in range(config.layers)])
        self.norm = RmsNorm(config.width, config.epsilon)

    def forward(self, hidden: Tensor, turns: Rope) -> Tensor:
        """(tokens, width) in and out."""
        for layer in self.layers.in_turn():
            hidden = layer(hidden, turns)
        found: Tensor = self.norm(hidden)
        return found


class LanguageLayer(nn.Module):
    """Attention, then an MLP, each on top of what was there."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.width, config.epsilon)
        self.self_attn = LanguageAttention(config)
        self.post_attention_layernorm = RmsNorm(config.width, config.epsilon)
        self.mlp = GatedMlp(config.width, config.inner, bias=False)

    def forward(self, hidden: Tensor, turns: Rope) -> Tensor:
        """(tokens, width) in and out."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), turns)
        found: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return found


class LanguageAttention(nn.Module):
    """Each token sees itself and those before it; several heads share one key."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self._head = config.head
        inner = config.key_heads * config.head
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, inner)
        self.v_proj = Linear(config.width, inner)
        self.o_proj = Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, turns: Rope) -> Tensor:
        """(tokens, width) in and out."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self._head))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turn(q, turns), turn(k, turns)
        # Batches of one, without which torch has no fast kernel on a card.
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found: Tensor = self.o_proj(mixed[0].transpose(0, 1).flatten(1))
        return found


def positions(tokens: int, slots: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Where tokens stand in time, row and column: (3, tokens), on the CPU.

    Text counts on in all three. The tokens of a picture share one time, its rows and columns count
    from there, and text goes on after the longer side (Qwen2-VL, section 2.1: M-RoPE). The stock
    edit pipelines do not tell the text encoder which tokens are pictures, and it then places them
    on a line.

    slots: the places of all pictures' tokens, in order; sizes: each picture's, (rows, columns).
    """
    parts, now, done, seen = [], 0, 0, 0
    for rows, columns in sizes:
        start = int(slots[seen])
        parts.append(_line(start - done, now))
        now += start - done
        by_row = torch.arange(rows).repeat_interleave(columns)
        by_column = torch.arange(columns).repeat(rows)
        parts.append(now + torch.stack([torch.zeros_like(by_row), by_row, by_column]))
        now += max(rows, columns)
        seen += rows * columns
        done = start + rows * columns
    return torch.cat([*parts, _line(tokens - done, now)], dim=1)


def _line(tokens: int, start: int) -> Tensor:
    return torch.arange(start, start + tokens).expand(3, -1)


def _angles(places: Tensor, config: LanguageConfig) -> Tensor:
    """By which tokens are turned, (tokens, head / 2): a section each by time, row and column."""
    angles = places[..., None] * frequencies(config.head // 2, config.theta)
    sections = torch.split(angles, config.sections, dim=-1)
    return torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
