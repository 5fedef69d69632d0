"""The fused kernels against what defines them: how long each pair takes on the model's shapes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from image_worker.kernels import operations, reference
from image_worker.kernels.reference import FP8, Quantised

WARM_UP = 3
Pair = tuple[str, Callable[[], Any], Callable[[], Any]]  # name; fused, and its reference


def measure(shape: Mapping[str, int], device: torch.device, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each pair, in turns, by CUDA events; or the problem.

    shape: heads, their size, text_tokens, image_tokens. {"pairs": [{"name", "fused", "reference"}]}
    or {"problem": why}. A pair that this card has no kernel for has {"name", "problem"}.
    """
    ops = operations(device)
    if ops is reference:
        return {"problem": "no card with compute capability 8.0"}
    found = []
    for name, fused, plain in pairs(ops, shape, device, torch.bfloat16):
        try:
            found.append({"name": name, **_in_turns(fused, plain, rounds)})
        except Exception as error:  # noqa: BLE001  (of Triton and CUDA: any; the others go on)
            found.append({"name": name, "problem": str(error).partition("\n")[0][:200]})
        torch.cuda.empty_cache()
    return {"pairs": found}


def pairs(
    ops: Any, shape: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> list[Pair]:
    """Each operation on what a block of the transformer gives it."""
    heads, size, text = shape["heads"], shape["size"], shape["text_tokens"]
    tokens, width = text + shape["image_tokens"], heads * size
    make = _Maker(device, dtype)
    x, wide, qkv = make(tokens, width), make(tokens, 4 * width), make(tokens, 3 * width)
    mods = [make(2, width) for _ in range(3)]
    owner = (torch.arange(tokens, device=device) >= text).long()
    places = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
    angles = make(tokens, size // 2).float()
    rope = torch.polar(torch.ones_like(angles), angles)
    norms = make(2, 2, size)
    gate, shift, scale = mods
    calls: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
        ("residual", "add", (x, x, gate, owner), {}),
        ("heads", "to_joint_heads", (qkv, norms, rope, places, text), {}),
        *(_of_norms(x, gate, shift, scale, owner, None)),
        ("GELU", "gelu", (wide,), {"round_to": None}),
        *(_of_norms(x, gate, shift, scale, owner, FP8)),
        ("GELU, to FP8", "gelu", (wide,), {"round_to": FP8}),
        ("attention's output, to FP8", "to_stream", (x, places), {"round_to": FP8}),
        ("rounding to FP8", "quantise", (x, FP8), {}),
        ("rounding to int8", "quantise", (x, torch.int8), {}),
        ("product in FP8", "multiply", (*_product(make, tokens, text, width),), {}),
    ]
    return [
        (name, partial(getattr(ops, of), *given, **how), partial(_plain, of, *given, **how))
        for name, of, given, how in calls
    ]


def _of_norms(
    x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, owner: Tensor, to: torch.dtype | None
) -> list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    name = "residual, norm and modulation" + (", to FP8" if to else "")
    given = (x, x, gate, shift, scale, owner)
    return [(name, "add_and_modulate", given, {"round_to": to})]


def _product(make: _Maker, tokens: int, text: int, width: int) -> tuple[Any, ...]:
    """Queries, keys and values of both streams from what attention reads."""
    x: Quantised = reference.quantise(make(tokens, width), FP8)
    weight = reference.quantise(make(6 * width, width), FP8)
    return x, text, weight.values, weight.scales, make(6 * width)


def _plain(name: str, *given: Any, **how: Any) -> Any:
    return getattr(reference, name)(*given, **how)


def _in_turns(fused: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> dict[str, float]:
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + rounds):
        for work, into in zip((fused, plain), taken, strict=True):
            begin, end = _event(), _event()
            begin.record()
            work()
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                into.append(begin.elapsed_time(end))
    return {"fused": statistics.median(taken[0]), "reference": statistics.median(taken[1])}


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Maker:
    """Makes noise, the same for the same sequence of shapes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)
