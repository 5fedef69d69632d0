"""The transformer's forward for training: plain torch over diffusers' own module, in one batch.

All rows have the same pictures' sizes; prompts are padded and masked. It is differentiable, which
what serves (`image_worker.model.transformer`) is not; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Packed:
    """Rows padded to one length. B rows, S image tokens, T text tokens, D half the head size.

    image (B, S, C); text (B, T, W); timestep (B); ropes complex (B, S, D) and (B, T, D);
    mask bool (B, 1, 1, T + S).
    """

    image: Tensor
    text: Tensor
    timestep: Tensor
    image_rope: Tensor
    text_rope: Tensor
    mask: Tensor


def velocities(model: Any, rows: Packed) -> Tensor:
    """(B, S, channels) from a `QwenImageTransformer2DModel`."""
    image = model.img_in(rows.image)
    text = model.txt_in(model.txt_norm(rows.text))
    temb = model.time_text_embed(rows.timestep, image)
    for block in model.transformer_blocks:
        text, image = _block(block, text, image, temb, rows)
    return model.proj_out(model.norm_out(image, temb))  # type: ignore[no-any-return]


def _block(
    block: Any, text: Tensor, image: Tensor, temb: Tensor, rows: Packed
) -> tuple[Tensor, Tensor]:
    image_mod = block.img_mod(temb)[:, None]
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
