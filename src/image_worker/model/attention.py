"""Ways to attend: from a block's queries, keys and values to what its next product reads.

Each row's tokens attend to each other only. `ATTENTION` chooses between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from image_worker.kernels import reference
from image_worker.kernels.attention_reference import TASK, TILE, attend_int8
from image_worker.kernels.reference import Activation

BACKENDS = [  # of torch's attention, best first; to be chosen around a forward
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

_TASK_ALIGNMENT = 8  # places: after so many, the order of pieces in tiles begins anew


@dataclass(frozen=True)
class Order:
    """How tokens stand for attention, N of all rows, in "joint order": each row's side by side.

    lengths: of each row; places (N): where in joint order the tokens stand, in stream order;
    rope (N, D / 2) complex64, stream order. targets: which tokens, in stream order, are of pictures
    that are being made, row after row; target_counts: how many of each row.

    For kernels, with each row padded to whole tiles: owners (P) int32: which token is in a place,
    -1 for none; tasks (M, 4) int32: pieces of the rows' queries, as `kernels.attention` takes them;
    target_tasks: the same, of those that hold targets.
    """

    lengths: tuple[int, ...]
    places: Tensor
    rope: Tensor
    targets: Tensor
    target_counts: tuple[int, ...]
    owners: Tensor
    tasks: Tensor
    target_tasks: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        targets: Sequence[tuple[int, int]],
        places: Tensor,
        rope: Tensor,
        device: torch.device,
    ) -> Order:
        """targets: in each row, the first and how many; places: on the CPU; rope: anywhere."""
        stream = torch.empty_like(places)
        stream[places] = torch.arange(len(places))
        owners, tasks, target_tasks, wanted, start = [], [], [], [], 0
        for row, (first, count) in zip(torch.split(stream, list(lengths)), targets, strict=True):
            padding = torch.full((-len(row) % TILE,), -1)
            owners += [row, padding]
            wanted.append(row[first : first + count])
            tasks += _tasks(start, len(row), range(0, len(row), TASK))
            aligned = first // _TASK_ALIGNMENT * _TASK_ALIGNMENT
            target_tasks += _tasks(start, len(row), range(aligned, first + count, TASK))
            start += len(row) + len(padding)
        return cls(
            tuple(lengths),
            places.to(device),
            rope.to(device),
            torch.cat(wanted).to(device),
            tuple(count for _, count in targets),
            torch.cat(owners).to(device, torch.int32),
            torch.tensor(tasks, dtype=torch.int32, device=device),
            torch.tensor(target_tasks, dtype=torch.int32, device=device),
        )


def _tasks(start: int, length: int, firsts: Iterable[int]) -> list[tuple[int, int, int, int]]:
    return [(start + first, start, start + length, 0) for first in firsts]


class Attention(Protocol):
    """qkv (N, 3 · heads · D), norms (2, 2, D): as `reference.to_joint_heads` takes them.

    Returns (N, heads · D), stream order, or of targets only; round_to: FP8, int8, or None for
    qkv's own type.
    """

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
        only_targets: bool = False,
    ) -> Activation: ...


class Exact:
    """In the activations' own type, by torch's kernels."""

    def __init__(self, ops: Any) -> None:
        """ops: `kernels.fused` or `kernels.reference`."""
        self._ops = ops

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
        only_targets: bool = False,
    ) -> Activation:
        q, k, v = self._ops.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
        found: Activation
        if only_targets:
            q = q[order.places[order.targets]]
            found = attend(q, k, v, order.lengths, order.target_counts)
            return found if round_to is None else self._ops.quantise(found, round_to)
        mixed = attend(q, k, v, order.lengths, order.lengths)
        found = self._ops.to_stream(mixed, order.places, round_to=round_to)
        return found


class Int8:
    """Queries and keys in int8, the rest in FP8: on Hopper, or slowly, as the reference."""

    def __init__(self, device: torch.device, cache: Path | None = None) -> None:
        """cache: a folder for compiled kernels."""
        self._attend = None
        if device.type == "cuda":
            from image_worker.kernels.attention import Attend

            self._attend = Attend(cache)

    def __call__(
        self,
        qkv: Tensor,
        norms: Tensor,
        order: Order,
        text_tokens: int,
        *,
        round_to: torch.dtype | None,
        only_targets: bool = False,
    ) -> Activation:
        if self._attend is None:
            q, k, v = reference.to_joint_heads(qkv, norms, order.rope, order.places, text_tokens)
            mixed = attend_int8(q, k, v, order.lengths)
            places = order.places[order.targets] if only_targets else order.places
            return reference.to_stream(mixed, places, round_to=round_to)
        from image_worker.kernels import fused

        tiles = self._attend.to_tiles(qkv, norms, order.rope, order.owners, text_tokens)
        tasks = order.target_tasks if only_targets else order.tasks
        mixed = self._attend(tiles, tasks, order.owners, len(qkv), norms.shape[-1])
        if only_targets:
            return fused.to_stream(mixed, order.targets, round_to=round_to)
        return mixed if round_to is None else fused.quantise(mixed, round_to)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], queries: Sequence[int]
) -> Tensor:
    """Softmax attention within each row: (N, heads, D) each to (N, heads · D), joint order.

    queries: how many of them each row has, which may be fewer than it has keys.
    """
    if len(set(lengths)) == len(set(queries)) == 1:  # as a batch, in one call
        rows = [
            tensor.view(len(lengths), count, *tensor.shape[1:])
            for tensor, count in ((q, queries[0]), (k, lengths[0]), (v, lengths[0]))
        ]
        return _attend(*rows).reshape(len(q), -1)
    split = [
        torch.split(part, list(counts))
        for part, counts in ((q, queries), (k, lengths), (v, lengths))
    ]
    return torch.cat(
        [_attend(*(part[None] for part in row)).flatten(2)[0] for row in zip(*split, strict=True)]
    )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, heads, D) in and out; of queries and the result L may be another.

    In this layout, seen through a transpose, cuDNN is fastest.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
