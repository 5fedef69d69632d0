"""The forward pass of the dual-stream transformer, for rows that differ in every shape.

It runs over the parameters of diffusers' `QwenImageTransformer2DModel` and computes what that
computes; what it adds is a rotary embedding per row and a mask over image tokens as well as text,
without which rows of different sizes cannot share a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, int, int]  # frames (1), height, width, in tokens


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
    def target_tokens(self) -> int:
        """How many of the image tokens are being denoised."""
        return self.shapes[0][1] * self.shapes[0][2]


@dataclass(frozen=True)
class Packed:
    """Rows padded to one length. B rows, S image tokens, T text tokens, D half the head size.

    image (B, S, C); text (B, T, W); timestep (B); ropes complex (B, S, D) and (B, T, D);
    mask bool (B, 1, 1, T + S) or None when nothing is padding; is_reference bool (B, S, 1).
    """

    image: Tensor
    text: Tensor
    timestep: Tensor
    image_rope: Tensor
    text_rope: Tensor
    mask: Tensor | None
    is_reference: Tensor


@torch.inference_mode()
def velocities(transformer: Any, rows: Sequence[Row]) -> list[Tensor]:
    """One forward for all rows: each row's velocity, (target tokens, channels), in the rows' type.

    transformer: a `QwenImageTransformer2DModel`; rows: at least one, on its device, in its type.
    """
    packed = _pack(transformer, rows)
    output = forward(transformer, packed)
    return [output[i, : row.target_tokens] for i, row in enumerate(rows)]


def _pack(transformer: Any, rows: Sequence[Row]) -> Packed:
    device, dtype = rows[0].image.device, rows[0].image.dtype
    ropes = [
        transformer.pos_embed([list(row.shapes)], device=device, max_txt_seq_len=row.text.shape[0])
        for row in rows
    ]
    text_lengths = [row.text.shape[0] for row in rows]
    image_lengths = [row.image.shape[0] for row in rows]
    even = len(set(text_lengths)) == 1 and len(set(image_lengths)) == 1
    mask = None
    if not even:
        mask = torch.cat([_valid(text_lengths, device), _valid(image_lengths, device)], dim=1)
        mask = mask[:, None, None, :]
    positions = torch.arange(max(image_lengths), device=device)
    targets = torch.tensor([row.target_tokens for row in rows], device=device)
    return Packed(
        image=_pad([row.image for row in rows]),
        text=_pad([row.text for row in rows]),
        # As the stock pipeline rounds it: to the model's type as 0..1000, then divided.
        timestep=torch.tensor([1000 * r.timestep for r in rows], device=device).to(dtype) / 1000,
        image_rope=_pad([image for image, _ in ropes]),
        text_rope=_pad([text for _, text in ropes]),
        mask=mask,
        is_reference=(positions[None, :] >= targets[:, None])[..., None],
    )


def _valid(lengths: list[int], device: torch.device) -> Tensor:
    return (
        torch.arange(max(lengths), device=device)[None]
        < torch.tensor(lengths, device=device)[:, None]
    )


def _pad(tensors: list[Tensor]) -> Tensor:
    """Stacks (tokens, …) tensors, with zeros after the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def forward(model: Any, rows: Packed) -> Tensor:
    image = model.img_in(rows.image)
    text = model.txt_in(model.txt_norm(rows.text))
    temb = model.time_text_embed(rows.timestep, image)
    # 2511's zero_cond_t: reference tokens are modulated as if their timestep were 0, since they
    # are clean pictures. Text and output use the row's own timestep.
    clean = model.time_text_embed(rows.timestep * 0, image) if model.zero_cond_t else None
    for block in model.transformer_blocks:
        text, image = _block(block, text, image, temb, clean, rows)
    return model.proj_out(model.norm_out(image, temb))  # type: ignore[no-any-return]


def _block(
    block: Any, text: Tensor, image: Tensor, temb: Tensor, clean: Tensor | None, rows: Packed
) -> tuple[Tensor, Tensor]:
    image_mod = block.img_mod(temb)[:, None]
    if clean is not None:
        image_mod = torch.where(rows.is_reference, block.img_mod(clean)[:, None], image_mod)
    shift1, scale1, gate1, shift2, scale2, gate2 = image_mod.chunk(6, dim=-1)
    text_mod = block.txt_mod(temb)[:, None]
    text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = text_mod.chunk(
        6, dim=-1
    )

    image_part, text_part = _attention(
        block.attn,
        block.img_norm1(image) * (1 + scale1) + shift1,
        block.txt_norm1(text) * (1 + text_scale1) + text_shift1,
        rows,
    )
    image = image + gate1 * image_part
    text = text + text_gate1 * text_part

    image = image + gate2 * block.img_mlp(block.img_norm2(image) * (1 + scale2) + shift2)
    text = text + text_gate2 * block.txt_mlp(
        block.txt_norm2(text) * (1 + text_scale2) + text_shift2
    )
    if image.dtype == torch.float16:  # the residual streams of this model overflow half precision
        image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
    return text, image


def _attention(attn: Any, image: Tensor, text: Tensor, rows: Packed) -> tuple[Tensor, Tensor]:
    """Joint attention over [text, image]: (B, S, width) and (B, T, width) in and out."""

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], attn.heads, -1)

    image_q = _rotate(attn.norm_q(heads(attn.to_q(image))), rows.image_rope)
    image_k = _rotate(attn.norm_k(heads(attn.to_k(image))), rows.image_rope)
    text_q = _rotate(attn.norm_added_q(heads(attn.add_q_proj(text))), rows.text_rope)
    text_k = _rotate(attn.norm_added_k(heads(attn.add_k_proj(text))), rows.text_rope)
    q = torch.cat([text_q, image_q], dim=1).transpose(1, 2)
    k = torch.cat([text_k, image_k], dim=1).transpose(1, 2)
    v = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], dim=1).transpose(1, 2)

    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask)
    mixed = mixed.transpose(1, 2).flatten(2)
    text_out, image_out = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
    return attn.to_out[0](image_out.contiguous()), attn.to_add_out(text_out.contiguous())


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates adjacent pairs, in float32. x (B, S, heads, 2D), rope complex (B, S, D)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope[:, :, None]).flatten(3).type_as(x)
