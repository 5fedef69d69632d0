"""The dual-stream transformer: its forward, for rows that differ in every shape.

It computes what diffusers' `QwenImageTransformer2DModel` computes, from the same weights. Rows are
packed without padding: all tokens lie one after the other, prompts first ("stream order"), so norms
and products never see which row is whose; for attention each row's tokens stand together ("joint
order") and see each other only. Modulation comes from tables (`modulation.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from image_worker.compute import Compute
from image_worker.kernels import operations, reference
from image_worker.kernels.reference import Activation
from image_worker.model.adapters import PRODUCTS, Adapter
from image_worker.model.attention import BACKENDS, Attention, Exact, Order
from image_worker.model.beside import Beside
from image_worker.model.embeddings import Shape, rope
from image_worker.model.linear import W8A8, Decoded, Pair, Scratch, product_of
from image_worker.model.low_rank import Changes, Reads, added
from image_worker.model.modulation import Modulation, Read
from image_worker.model.packed import joined
from image_worker.model.stream import Blocks

# What activations are rounded to for products in each of these; None: they keep their type.
ROUND_TO: dict[Compute, torch.dtype | None] = {
    "bf16": None,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_TEXT, _IMAGE = 0, 1


@dataclass(frozen=True)
class Row:
    """One sequence: a target picture with its references, and one prompt.

    image: (tokens, channels), the target's latents, then each reference's;
    shapes: one per picture, target first; text: (tokens, width); timestep: in [0, 1].
    """

    image: Tensor
    shapes: tuple[Shape, ...]
    text: Tensor
    timestep: float

    @property
    def outline(self) -> Outline:
        """What of it decides how it is laid out."""
        return self.shapes, len(self.text)


Outline = tuple[tuple[Shape, ...], int]  # a row's pictures, and how many tokens its prompt has


@dataclass(frozen=True)
class Layout:
    """Where tokens stand, for rows of given outlines. N tokens in all.

    order: for attention; owner (N): which modulation each token has: of its row's prompt, of its
    row's picture (from the number of rows on), or of a picture without noise (the last);
    target_rows: of which row each target token is.
    """

    text_tokens: int
    order: Order
    owner: Tensor
    target_rows: Tensor


@torch.inference_mode()
def velocities(
    transformer: Transformer, rows: Sequence[Row], adapter: Adapter | None = None
) -> list[Tensor]:
    """One forward for all rows: each row's velocity, (target tokens, channels), in the rows' type.

    rows: at least one, on the transformer's device, in its type; adapter: the LoRAs of all rows, on
    top of those that are always beside the weights.
    """
    layout = transformer.layout(tuple(row.outline for row in rows))
    text = torch.cat([row.text for row in rows])
    image = torch.cat([row.image for row in rows])
    with sdpa_kernel(BACKENDS, set_priority=True):
        output = transformer(text, image, [row.timestep for row in rows], layout, adapter)
    return list(output.split(layout.order.target_counts))


class Transformer(nn.Module):
    """The module that serves, made from one that holds a checkpoint's weights."""

    def __init__(
        self,
        source: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        round_to: torch.dtype | None,
        attention: Attention | None = None,
        read: Read | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Takes `source` apart: a `Skeleton` or diffusers' module, whose parts are called alike.

        round_to: multiply weights in 4 bit in this type, FP8 or int8, and those that are stored in
        it; all others, or None: as they are. read: as of `Modulation`; beside: LoRAs of every
        forward.
        """
        super().__init__()
        self.config = source.config
        self.zero_cond_t: bool = source.config.zero_cond_t
        self.width: int = source.img_in.out_features
        self._axes = tuple(source.config.axes_dims_rope)
        self.device = device
        self.img_in, self.txt_in, self.txt_norm = source.img_in, source.txt_in, source.txt_norm
        self.proj_out = source.proj_out
        self.time_embed = source.time_text_embed
        timestep = beside.timestep if beside else None
        self.modulation = Modulation(source, device, dtype, read, timestep)
        self.layout = functools.lru_cache(maxsize=8)(self._layout)
        self._ops = operations(device)
        attention = attention or Exact(self._ops)
        scratch = Scratch(device, round_to or dtype)
        self.blocks = Blocks()
        for number, block in enumerate(source.transformer_blocks):
            self.blocks.append(Block(block, self._ops, attention, scratch, round_to))
            source.transformer_blocks[number] = nn.Identity()  # its weights are copied: let it go
        self.beside = beside.adapter(self.reads, device, dtype) if beside else None

    @property
    def reads(self) -> list[Reads]:
        """Of each block, what inputs of its products are rounded to, by the products' names."""
        return [
            {product: getattr(block, product).round_to for product in PRODUCTS}
            for block in self.blocks
        ]

    def prepare(self, timesteps: Sequence[float], adapter: Adapter | None = None) -> list[Tensor]:
        """The modulation of a schedule, to be held until it is over: made now, if it is new."""
        timesteps = [*timesteps, 0.0] if self.zero_cond_t else timesteps
        return self.modulation.prepare(timesteps, adapter.timestep if adapter else None)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        timesteps: Sequence[float],
        layout: Layout,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Velocities of all targets, (tokens, channels).

        text (T, width), image (S, channels): of all rows; timesteps: one for each row.
        """
        ops, owner = self._ops, layout.owner
        adapters = [one for one in (self.beside, adapter) if one]
        timestep = adapter.timestep if adapter else None
        mods = self.modulation.of_blocks(self._streams(timesteps), timestep).unbind(1)
        text = reference.rms_norm(text, self.txt_norm.weight)
        x = torch.cat(
            [self._outside("txt_in", text, adapters), self._outside("img_in", image, adapters)]
        )
        y, gate = None, None  # what is still to be added to x
        text_tokens = layout.text_tokens
        last = len(self.blocks) - 1
        block: Any
        for number, (block, mod) in enumerate(zip(self.blocks.in_turn(), mods, strict=True)):
            shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)
            changes = [one.blocks[number] for one in adapters]
            x, y = ops.add_and_modulate(
                x, y, gate, shift1, scale1, owner, round_to=block.qkv.round_to
            )
            y = block.attend(y, layout, changes, only_targets=number == last)
            if number == last:  # nobody reads what becomes of the other tokens
                targets = layout.order.targets
                x, owner, text_tokens = x[targets], owner[targets], 0
            x, y = ops.add_and_modulate(
                x, y, gate1, shift2, scale2, owner, round_to=block.up.round_to
            )
            y, gate = block.mlp(y, text_tokens, changes), gate2
        x = ops.add(x, y, gate, owner)
        scale, shift = self.modulation.of_output(timesteps, timestep).unbind(1)
        x = ops.modulate(x, shift, scale, layout.target_rows, round_to=None)
        return self._outside("proj_out", x, adapters)

    def _outside(self, name: str, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
        """(N, out) from x (N, in), by a layer that is in no block."""
        found: Tensor = getattr(self, name)(x)
        for adapter in adapters:
            adapter.add_to(name, found, x)
        return found

    def _streams(self, timesteps: Sequence[float]) -> list[tuple[float, int]]:
        """Whose modulation `Layout.owner` counts."""
        found = [(level, stream) for stream in (_TEXT, _IMAGE) for level in timesteps]
        # 2511's zero_cond_t: reference tokens are modulated as if their timestep were 0, since
        # they are clean pictures. Prompts and output use the row's own timestep.
        return [*found, (0.0, _IMAGE)] if self.zero_cond_t else found

    def _layout(self, outlines: tuple[Outline, ...]) -> Layout:
        texts = [text for _, text in outlines]
        counts = [[height * width for _, height, width in shapes] for shapes, _ in outlines]
        images = [sum(pictures) for pictures in counts]
        lengths = [text + image for text, image in zip(texts, images, strict=True)]
        starts = [sum(lengths[:row]) for row in range(len(lengths))]
        rows = len(outlines)
        text_ropes, image_ropes = [], []
        places: list[Tensor] = [torch.arange(a, a + n) for a, n in zip(starts, texts, strict=True)]
        owner: list[Tensor] = [torch.full((n,), row) for row, n in enumerate(texts)]
        target_rows = []
        for row, (shapes, text) in enumerate(outlines):
            places.append(torch.arange(starts[row] + text, starts[row] + lengths[row]))
            clean = 2 * rows if self.zero_cond_t else rows + row
            target, rest = counts[row][0], images[row] - counts[row][0]
            owner += [torch.full((target,), rows + row), torch.full((rest,), clean)]
            target_rows.append(torch.full((target,), row))
            image_rope, text_rope = rope(shapes, text, self._axes)
            text_ropes.append(text_rope)
            image_ropes.append(image_rope)
        return Layout(
            text_tokens=sum(texts),
            order=Order.of(
                lengths,
                [(text, pictures[0]) for text, pictures in zip(texts, counts, strict=True)],
                torch.cat(places),
                torch.cat(text_ropes + image_ropes),
                self.device,
            ),
            owner=self._index(owner),
            target_rows=self._index(target_rows),
        )

    def _index(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(self.device)


class Block(nn.Module):
    """One of the transformer's blocks."""

    def __init__(
        self,
        source: Any,
        ops: Any,
        attention: Attention,
        scratch: Scratch,
        round_to: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._ops, self._attention, attn = ops, attention, source.attn

        def product(image: Sequence[Any], text: Sequence[Any]) -> Pair | W8A8 | Decoded:
            return product_of(image, text, scratch, ops, round_to)

        self.qkv = product(
            (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        self.out = product((attn.to_out[0],), (attn.to_add_out,))
        self.up = product((source.img_mlp.net[0].proj,), (source.txt_mlp.net[0].proj,))
        self.down = product((source.img_mlp.net[2],), (source.txt_mlp.net[2],))
        norms = (attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k)
        weights = [norm.weight.detach() for norm in norms]
        self.norms = nn.Buffer(joined(weights).view(2, 2, -1))

    def attend(
        self, y: Activation, layout: Layout, changes: Sequence[Changes], *, only_targets: bool
    ) -> Tensor:
        """Joint attention, each row for itself: (N, width), stream order; or of targets only."""
        qkv = added("qkv", changes, self.qkv(y, layout.text_tokens), y, layout.text_tokens)
        mixed = self._attention(
            qkv,
            self.norms,
            layout.order,
            layout.text_tokens,
            round_to=self.out.round_to,
            only_targets=only_targets,
        )
        text_tokens = 0 if only_targets else layout.text_tokens
        return added("out", changes, self.out(mixed, text_tokens), mixed, text_tokens)

    def mlp(self, y: Activation, text_tokens: int, changes: Sequence[Changes]) -> Tensor:
        """(N, width) in and out."""
        wide = added("up", changes, self.up(y, text_tokens), y, text_tokens)
        y = self._ops.gelu(wide, round_to=self.down.round_to)
        return added("down", changes, self.down(y, text_tokens), y, text_tokens)
