"""Where the card's time goes while a picture is made: kernels by what they do, as torch sees them.

What serves names its own kernels; those of libraries are told apart by words in their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# What a kernel does, by the first pattern that its name holds: ours, then those of libraries.
GROUPS = (
    ("products", r"^_(products|multiply)_kernel\b"),
    ("attention", r"^attend\b"),
    ("decoding of weights", r"^_(decode|decode_rounded|numbers|q8|q4_q5|k|svdq|fp8)_kernel\b"),
    ("norms, modulation, residuals", r"^_norm_kernel\b"),
    ("GELU", r"^_gelu_kernel\b"),
    ("heads: norms, rotation, order", r"^(_to_joint_kernel|to_tiles)\b"),
    ("rounding of activations", r"^_quantise_kernel\b|Int8VectorQuant"),
    ("copies", r"^mem(cpy|set)\b"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("decoding of weights", r"dequantize"),
    ("convolutions", r"conv(?!ert)|wgrad|dgrad|fprop"),
    ("products", r"gemm|gemv|nvjet|cutlass|xmma|splitk|dequant_mm"),
)
OTHERS = "others"
NAMES = (*dict.fromkeys(name for name, _ in GROUPS), OTHERS)
_PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in GROUPS]


def measure(run: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of the card's kernels and copies during `run`, in whichever thread they begin.

    {"parts": [{"name", "ms", "count"}]}, in the order of NAMES, or {"problem": why}.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        run()
        torch.cuda.synchronize()
    rows = watched.key_averages()
    found = parts_of((row.key, row.self_device_time_total, row.count) for row in rows)
    return {"parts": found} if found else {"problem": "the driver lets nobody watch kernels"}


def parts_of(kernels: Iterable[tuple[str, float, int]]) -> list[dict[str, Any]]:
    """kernels: name, microseconds in all, how often. Groups of which there is none are left out."""
    parts: dict[str, dict[str, Any]] = {}
    for kernel, microseconds, count in kernels:
        if microseconds <= 0:  # of the host alone
            continue
        name = group_of(kernel)
        part = parts.setdefault(name, {"name": name, "ms": 0.0, "count": 0})
        part["ms"] += microseconds / 1000
        part["count"] += count
    return [parts[name] for name in NAMES if name in parts]


def group_of(kernel: str) -> str:
    """What a kernel of that name does."""
    return next((name for name, pattern in _PATTERNS if pattern.search(kernel)), OTHERS)
