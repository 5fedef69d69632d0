"""Weight formats, one file each: how a linear layer's weight is stored, and in how many bytes.

A format's `encode` turns a full-precision weight into the layer that takes its place; `empty` makes
that layer without its tensors, to be filled from bytes that were encoded before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from image_worker.model.formats import fp8, int8, nf4, svdq
from image_worker.settings import Precision


@dataclass(frozen=True)
class Format:
    """How to store linear layers.

    encode(weight, bias, dtype): weight (out, in) on the device where it stays; the bias, if `bias`,
    is set later; dtype is the one to compute in.
    empty(rows, columns, bias, dtype): the same layer, its tensors on the meta device;
    size(rows, columns): bytes of the stored weight.
    """

    encode: Callable[[Tensor, bool, torch.dtype], nn.Module]
    empty: Callable[[int, int, bool, torch.dtype], nn.Module]
    size: Callable[[int, int], int]


def format_of(
    precision: Precision, rank: int = svdq.RANK, ranges: Tensor | None = None
) -> Format | None:
    """How a linear layer is stored at that precision; None: as the checkpoint has it.

    rank, ranges: of `svdq.encode`; no other format has any.
    """
    if precision == "svdq":
        return Format(
            functools.partial(svdq.encode, rank=rank, ranges=ranges),
            functools.partial(svdq.empty, rank=rank),
            functools.partial(svdq.size, rank=rank),
        )
    return _FORMATS[precision]


_FORMATS: dict[Precision, Format | None] = {
    "bf16": None,
    "fp8": Format(fp8.encode, fp8.empty, fp8.size),
    "8bit": Format(int8.encode, int8.empty, int8.size),
    "4bit": Format(nf4.encode, nf4.empty, nf4.size),
}
