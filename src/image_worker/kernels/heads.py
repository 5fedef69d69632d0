"""Attention's queries, keys and values from those of two streams: normed, turned, in joint order.

One program per token and each of the three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from image_worker.kernels.reference import EPSILON

_EPSILON = tl.constexpr(EPSILON)


def to_joint(
    qkv: Tensor, norms: Tensor, rope: Tensor, places: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.to_joint_heads`."""
    tokens, size = len(qkv), norms.shape[-1]
    heads = qkv.shape[1] // 3 // size
    joint = torch.empty(3, tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    _to_joint_kernel[(tokens, 3)](
        qkv,
        norms,
        torch.view_as_real(rope),
        places,
        joint,
        tokens,
        text_tokens,
        heads,
        SIZE=size,
        HEADS=triton.next_power_of_2(heads),
        num_warps=4,
    )
    return joint[0], joint[1], joint[2]


@triton.jit
def _to_joint_kernel(  # type: ignore[no-untyped-def]
    qkv,
    norms,
    rope,
    places,
    joint,
    tokens,
    text_tokens,
    heads,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = tl.load(places + token).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = head < heads
    width = heads * SIZE
    at = head * SIZE + column
    x = tl.load(qkv + token * 3 * width + part * width + at, mask=inside, other=0.0)
    target = joint + part.to(tl.int64) * tokens * width + place * width + at
    if part < 2:
        x = x.to(tl.float32)
        stream = (token >= text_tokens).to(tl.int32)
        weight = tl.load(norms + (stream * 2 + part) * SIZE + column).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / SIZE + _EPSILON) * weight
        even, odd = tl.split(tl.reshape(x, (HEADS, SIZE // 2, 2)))
        pair = tl.arange(0, SIZE // 2)[None, :]
        cosine = tl.load(rope + token * SIZE + 2 * pair)
        sine = tl.load(rope + token * SIZE + 2 * pair + 1)
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(turned, (HEADS, SIZE)).to(joint.dtype.element_ty)
    tl.store(target, x, mask=inside)
