"""Compiles every Triton kernel, as the full model launches it, for cards that are not here.

Run as a program, since the tests' own process has Triton's interpreter in the compiler's place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from image_worker.kernels import fp8, fused, gguf, heads, int8, nf4, products, svdq
from tools.ggml import block_of

BF16, FP16, FP8, INT8, FP32 = "*bf16", "*fp16", "*fp8e4nv", "*i8", "*fp32"
INT, INDEX, BYTES, INT16, INT32 = "i32", "*i64", "*u8", "*i16", "*i32"
NORM = dict.fromkeys(("x", "y", "gate", "shift", "scale"), BF16) | {
    "owner": INDEX,
    "residual": BF16,
    "values": FP8,
    "scales": FP32,
    "width": INT,
    "stride": INT,
}
FLAGS = {"ADD": True, "MODULATE": True, "ROUND": True, "CLIP": False}
SCALES = dict.fromkeys(("levels", "scales_of_scales", "offsets", "grid"), FP32)
DECODE = {"codes": BYTES, "scales": BYTES, **SCALES, "into": BF16} | dict.fromkeys(
    ("blocks", "layer_blocks", "layer_stride"), INT
)
DECODE_ROUNDED = {
    "codes": INT32,
    "scales": BYTES,
    **SCALES,
    "row_scales": FP32,
    "found": INT32,
} | dict.fromkeys(("rows", "blocks", "layer_rows", "layer_stride"), INT)
DECODE_SIZES = {"ROWS": nf4._ROWS, "BLOCKS": nf4._BLOCKS, "WORDS": nf4._WORDS}
# One for each way through these kernels; on Hopper all are compiled, elsewhere the first.
GGUF_TYPES = ("Q6_K", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "F16")
SVDQ = {"codes": BYTES, "scales": BF16, "inverse": FP32, "down": BF16, "up": BF16} | {
    "row_scales": FP32,
    "into": BF16,
    **dict.fromkeys(("height", "groups"), INT),
}
SVDQ_SIZES = svdq.SIZES | {"RANK": 128}
MULTIPLY = {"x": INT8, "x_scales": FP32, "weight": INT8, "scales": FP32, "bias": BF16} | {
    "into": BF16,
    **dict.fromkeys(("tokens", "rows", "columns", "stride"), INT),
}
PRODUCTS = {
    "x": "tensordesc<{}[128, 128]>",
    "x_scales": FP32,
    "weight": "tensordesc<{}[256, 128]>",
    "scales": FP32,
    "bias": BF16,
    "into": "tensordesc<bf16[128, 128]>",
    **dict.fromkeys(
        ("before", "text_tokens", "tokens", "rows", "columns", "tiles", "group", "programs"), INT
    ),
}
ALIGNED = (
    "rows",
    "columns",
    "stride",
    "height",
    "groups",
)  # of numbers, those that are multiples of 16
LEAST_FOR_FP8, HOPPER = 89, 90

Kernel = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def kernels(capability: int) -> Iterator[Kernel]:
    """Each kernel, the types of its arguments, its constants, how it is launched."""
    for values in (INT8, FP8) if capability >= LEAST_FOR_FP8 else (INT8,):
        rounded = {"values": values, "scales": FP32}
        yield fused._norm_kernel, NORM | rounded, FLAGS | {"BLOCK": 4096}, {"num_warps": 4}
        gelu = {"x": BF16, **rounded, "width": INT}
        yield fused._gelu_kernel, gelu, {"ROUND": True, "BLOCK": 4096}, {"num_warps": 8}
        quantise = {"x": BF16, "places": INDEX, **rounded, "width": INT}
        yield fused._quantise_kernel, quantise, {"GATHER": True, "BLOCK": 4096}, {"num_warps": 4}
        flags = DECODE_SIZES | {"INT8": values == INT8}
        yield nf4._decode_rounded_kernel, DECODE_ROUNDED, flags, {"num_warps": 4}
        yield decoding_of("Q5_K", values, scaled=True)
        flags = SVDQ_SIZES | {"ROUND": True}
        yield svdq._svdq_kernel, SVDQ | {"into": values}, flags, svdq.LAUNCH
    for name in GGUF_TYPES if capability == HOPPER else GGUF_TYPES[:1]:
        yield decoding_of(name, BF16, scaled=False)
    widened = {"values": BYTES, "scales": FP32, "into": BF16, "columns": INT}
    yield fp8._fp8_kernel, widened, {"BLOCK": fp8.BLOCK}, {"num_warps": 4}
    for into in (BF16, FP16):
        yield nf4._decode_kernel, DECODE | {"into": into}, {"RUN": nf4._RUN}, nf4.LAUNCH
        flags = SVDQ_SIZES | {"ROUND": False}
        yield svdq._svdq_kernel, SVDQ | {"row_scales": into, "into": into}, flags, svdq.LAUNCH
    flags = FLAGS | {"ROUND": False, "BLOCK": 4096}
    yield fused._norm_kernel, NORM | {"values": BF16, "scales": BF16}, flags, {"num_warps": 4}
    yield (
        heads._to_joint_kernel,
        {"qkv": BF16, "norms": BF16, "rope": FP32, "places": INDEX, "joint": BF16}
        | dict.fromkeys(("tokens", "text_tokens", "heads"), INT),
        {"SIZE": 128, "HEADS": 32},
        {"num_warps": 4},
    )
    tiles = int8.tile_sizes(divmod(capability, 10))
    launch = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    for whole in (True, False):
        constants = tiles | {"WHOLE": whole, "GROUP": int8._GROUP}
        yield int8._multiply_kernel, MULTIPLY, constants, launch
    for values in (INT8, FP8) if capability == HOPPER else ():
        types = {name: kind.format(values.removeprefix("*")) for name, kind in PRODUCTS.items()}
        constants = products.SIZES | {"INT8": values == INT8, "DTYPE": triton.language.bfloat16}
        yield products._products_kernel, types, constants, products.LAUNCH


def decoding_of(name: str, into: str, *, scaled: bool) -> Kernel:
    """The kernel that decodes one of ggml's types."""
    values, size = block_of(name)
    kernel, constants = gguf.launch_of(name, size)
    constants |= {"SCALED": scaled, "RUN": gguf.VALUES // values}
    numbers = [("numbers", FP16), ("count", INT), ("columns", INT)]
    words = [("words", INT16), ("blocks", INT), ("row_blocks", INT)]
    source, *sizes = numbers if name == "F16" else words
    types = [source, ("row_scales", FP32), ("into", into), *sizes]
    return kernel, dict(types), constants, gguf.LAUNCH


def main() -> None:
    """For the compute capabilities that the command names, such as 80 90."""
    for capability in map(int, sys.argv[1:]):
        compile_all(capability)


def compile_all(capability: int) -> None:
    """Prints a line for each kernel, which begins with the capability."""
    target = GPUTarget("cuda", capability, 32)
    for kernel, types, constants, launch in kernels(capability):
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {
            (number,): [["tt.divisibility", 16]]
            for number, (name, kind) in enumerate(types.items())
            if kind.startswith("*") or name in ALIGNED
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=target, options=launch)
        size, shared = len(compiled.asm["cubin"]), compiled.metadata.shared
        name, count = kernel.__name__, compiled.asm["ptx"].count("fma.rn.f32")
        print(capability, name, size, "bytes,", count, "fused products, of shared memory", shared)


if __name__ == "__main__":
    main()
