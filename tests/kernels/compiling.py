"""Compiles every Triton kernel, as the full model launches it, for cards that are not here.

Run as a program, since the tests' own process has Triton's interpreter in the compiler's place.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from image_worker.kernels import fused, nf4

BF16, FP8, FP32 = "*bf16", "*fp8e4nv", "*fp32"
INT, INDEX, BYTES, INT32 = "i32", "*i64", "*u8", "*i32"
NORM = dict.fromkeys(("x", "y", "gate", "shift", "scale"), BF16) | {
    "owner": INDEX,
    "residual": BF16,
    "values": FP8,
    "scales": FP32,
    "width": INT,
    "stride": INT,
}
FLAGS = {"ADD": True, "MODULATE": True, "FP8": True, "CLIP": False}
# Each kernel, the types of its arguments, its constants, its warps.
KERNELS: tuple[tuple[Any, dict[str, str], dict[str, Any], int], ...] = (
    (fused._norm_kernel, NORM, FLAGS | {"BLOCK": 4096}, 4),
    (
        fused._norm_kernel,
        NORM | {"values": BF16, "scales": BF16},
        FLAGS | {"FP8": False, "BLOCK": 4096},
        4,
    ),
    (
        fused._gelu_kernel,
        {"x": BF16, "values": FP8, "scales": FP32, "width": INT},
        {"FP8": True, "BLOCK": 4096},
        8,
    ),
    (
        fused._quantise_kernel,
        {"x": BF16, "places": INDEX, "values": FP8, "scales": FP32, "width": INT},
        {"GATHER": True, "BLOCK": 4096},
        4,
    ),
    (
        fused._heads_kernel,
        {"qkv": BF16, "norms": BF16, "rope": FP32, "places": INDEX, "joint": BF16}
        | dict.fromkeys(("tokens", "text_tokens", "heads"), INT),
        {"SIZE": 128, "HEADS": 32},
        4,
    ),
    (
        nf4._decode_kernel,
        {"codes": INT32, "scales": BYTES}
        | dict.fromkeys(("levels", "scales_of_scales", "offsets", "grid", "row_scales"), FP32)
        | {"found": INT32}
        | dict.fromkeys(("rows", "blocks", "layer_rows", "layer_stride"), INT),
        {"ROWS": nf4._ROWS, "BLOCKS": nf4._BLOCKS, "WORDS": nf4._WORDS},
        4,
    ),
)


def main() -> None:
    """For the compute capability that the command names, such as 90."""
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for kernel, types, constants, warps in KERNELS:
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, kind in enumerate(types.values())
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        print(kernel.__name__, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
