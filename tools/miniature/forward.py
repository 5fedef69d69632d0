"""The text encoder's forward for training: many prompts of one layout at once, nothing ragged.

The pictures of the miniature's world have one size, so a prompt's pictures always stand at the
same places, and a batch needs no loop over its pictures, which is what makes the modules' own
forward slow. It computes what that computes (`tests/tools/test_forward.py`), on its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from image_worker.catalog import CATALOG, PromptTemplate

PATCH = 16  # pixels; patches are merged two by two
SEEN_SIDE = 128  # what the text encoder sees of a picture, in pixels
_MERGED = SEEN_SIDE // PATCH // 2
VISION_TOKENS = _MERGED**2
MOST_WORDS = 20  # tokens of an instruction


@dataclass(frozen=True)
class Layout:
    """Prompts with `pictures` pictures: `head`, the instruction, `tail`, padding up to `length`.

    pads: where the pictures' tokens stand, (pictures · VISION_TOKENS);
    positions: of every token in time, height and width, (3, length).
    """

    pictures: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    length: int
    drop: int
    pads: Tensor
    positions: Tensor

    @property
    def kept(self) -> int:
        """Tokens, padding included, that the transformer reads."""
        return self.length - self.drop

    def tokens(self, instructions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (instructions, length), int16, and the lengths without padding and head.

        Raises:
            ValueError: an instruction has more than `MOST_WORDS` tokens.
        """
        ids = torch.zeros(len(instructions), self.length, dtype=torch.int16)
        lengths = torch.empty(len(instructions), dtype=torch.int16)
        for row, words in enumerate(instructions):
            if len(words) > MOST_WORDS:
                raise ValueError(f"an instruction of {len(words)} tokens; {MOST_WORDS} are most")
            prompt = (*self.head, *words, *self.tail)
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int16)
            lengths[row] = len(prompt) - self.drop
        return ids, lengths


def layout(tokenizer: Any, pictures: int, device: torch.device) -> Layout:
    """The layout of prompts in the miniature's template."""
    template: PromptTemplate = CATALOG["mini"].template
    pad = "<|image_pad|>"
    before, after = template.render("\0", pictures).split("\0")
    head = tokenizer(before.replace(pad, pad * VISION_TOKENS)).input_ids
    tail = tokenizer(after).input_ids
    length = len(head) + MOST_WORDS + len(tail)
    length += -length % 8  # attention is faster so
    pad_id = tokenizer.convert_tokens_to_ids(pad)
    is_pad = torch.tensor(head) == pad_id
    return Layout(
        pictures,
        tuple(head),
        tuple(tail),
        length,
        template.drop,
        is_pad.nonzero()[:, 0].to(device),
        _positions(is_pad.tolist(), length).to(device),
    )


def _positions(is_pad: list[bool], length: int) -> Tensor:
    """Text counts on; a picture's patches share one time and count rows and columns from it."""
    positions, now, index = torch.zeros(3, length, dtype=torch.long), 0, 0
    grid = torch.arange(_MERGED)
    while index < length:
        if index < len(is_pad) and is_pad[index]:
            span = slice(index, index + VISION_TOKENS)
            positions[0, span] = now
            positions[1, span] = now + grid.repeat_interleave(_MERGED)
            positions[2, span] = now + grid.repeat(_MERGED)
            now, index = now + _MERGED, index + VISION_TOKENS
        else:
            positions[:, index] = now
            now, index = now + 1, index + 1
    return positions


def encode_text(model: Any, layout: Layout, ids: Tensor, patches: Tensor) -> Tensor:
    """What the transformer reads of prompts: (B, layout.kept, width).

    model: a `Qwen2_5_VLModel`; ids (B, length); patches (B · pictures, patches, values).
    """
    text = model.language_model
    vision = _see(model.visual, patches).view(len(ids), -1, text.config.hidden_size)
    hidden = text.embed_tokens(ids.long()).index_copy(1, layout.pads, vision)
    sections = text.config.rope_parameters["mrope_section"]
    rope = _text_rope(text.rotary_emb.inv_freq, layout.positions, sections)
    for layer in text.layers:
        hidden = hidden + _attend(layer.self_attn, layer.input_layernorm(hidden), rope)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return text.norm(hidden)[:, layout.drop :]  # type: ignore[no-any-return]


def _text_rope(
    frequencies: Tensor, positions: Tensor, sections: list[int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (tokens, head size): sections of the head turn with time, row, column."""
    angles = positions[..., None].float() * frequencies.float()
    mixed = [part[axis] for axis, part in enumerate(angles.split(sections, dim=-1))]
    angle = torch.cat(mixed * 2, dim=-1)
    return angle.cos(), angle.sin()


def _attend(attention: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Causal self-attention with grouped keys. Padding stands last, where none looks."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

    q = _turn(heads(attention.q_proj(hidden)), rope)
    k = _turn(heads(attention.k_proj(hidden)), rope)
    v = heads(attention.v_proj(hidden))
    groups = attention.num_key_value_groups
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _see(visual: Any, patches: Tensor) -> Tensor:
    """The vision tower: (pictures, patches, values) to (pictures, VISION_TOKENS, width).

    A picture of this size is a single window, so every block attends to all of it.
    """
    weight = visual.patch_embed.proj.weight.flatten(1)
    hidden = functional.linear(patches, weight)
    rope = _vision_rope(hidden.shape[-1] // visual.config.num_heads, hidden.device)
    for block in visual.blocks:
        q, k, v = (
            x.unflatten(-1, (visual.config.num_heads, -1)).transpose(1, 2)
            for x in block.attn.qkv(block.norm1(hidden)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(_turn(q, rope), _turn(k, rope), v)
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = visual.merger.ln_q(hidden).unflatten(1, (VISION_TOKENS, 4)).flatten(2)
    return visual.merger.mlp(merged)  # type: ignore[no-any-return]


def _vision_rope(head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (patches, head size), for patches in the order of `patches`."""
    frequencies = 10_000.0 ** -(torch.arange(0, head // 2, 2, device=device) / (head // 2))
    rows = torch.arange(2 * _MERGED, device=device)
    grid = torch.stack(torch.meshgrid(rows, rows, indexing="ij"))
    grid = grid.view(2, _MERGED, 2, _MERGED, 2).transpose(2, 3).flatten(1)
    angles = (grid[..., None] * frequencies).unbind(0)
    angle = torch.cat([*angles, *angles], dim=-1)
    return angle.cos(), angle.sin()


def _turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (…, tokens, head size): its halves are the pairs' two parts."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * rope[0] + turned * rope[1]).to(x.dtype)


def patches(pictures: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Pictures (B, 3, SEEN_SIDE, SEEN_SIDE) in [0, 1] as the image processor cuts them:
    (B, patches, values). mean and deviation (3) normalise their channels.

    Patches that are merged follow each other; each stands twice, for two frames.
    """
    cut = (pictures - mean[:, None, None]) / deviation[:, None, None]
    cut = cut.view(-1, 3, _MERGED, 2, PATCH, _MERGED, 2, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)
    return cut.unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2)
