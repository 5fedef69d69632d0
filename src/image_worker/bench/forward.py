"""Forwards of the transformer, diffusers' and ours: `python -m image_worker.bench.forward`.

The true architecture with random weights, made on the card: no files are needed. All ways measure
alternately, forward by forward. "rel." is the distance of an output from the stock module's, with
the same weights in float32, relative to its length. What the card has no room for is left out, and
said: 140 GB hold everything.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from image_worker.compute import Compute, automatic, possible
from image_worker.model.attention import Int8
from image_worker.model.formats import FORMATS
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from image_worker.settings import Precision

ROUNDS = 9
PROMPT_TOKENS = 256
CASES = ((1024, 1), (1024, 2), (512, 1), (1024, 0), (512, 0))  # side of the result, references
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "4bit")
OUTLIERS, OUTLIER_SIZE = 4, 20.0  # channels of each kind, and how much larger than the others
FLOAT32_BYTES = 90 * 2**30  # the model takes 76 GiB, a forward some more
_CARD = torch.device("cuda")
_COLUMNS = ("result", "references", "batch", "weights", "how", "ms", "± ms", "rel.")


def main() -> None:
    """Measures every case in every precision; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outliers", action="store_true", help="some channels 20 times the others")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=FORMATS)
    parser.add_argument("--batch", type=int, default=1, help="rows of each forward")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    cases = [CASES[number] for number in options.cases or range(len(CASES))]
    rows = {case: random_row(*case) for case in cases}
    model = random_model()
    if options.outliers:
        plant_outliers(model)
    if torch.cuda.mem_get_info()[1] > FLOAT32_BYTES:
        exact = in_float32(model, rows)
    else:
        sys.stdout.write("in float32 the model does not fit: rel. is to stock bf16\n")
        exact = {case: stock(model, row) for case, row in rows.items()}
    sys.stdout.write(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|\n")
    found = []
    for precision in options.precisions:
        gc.collect()  # the last precision's modules, which hold themselves
        torch.cuda.empty_cache()
        try:
            for result in _compare(precision, model, rows, exact, options):
                found.append(dict(zip(_COLUMNS, result, strict=True)))
                sys.stdout.write("| " + " | ".join(map(str, result)) + " |\n")
                sys.stdout.flush()
        except torch.OutOfMemoryError:
            sys.stdout.write(f"{precision} is left out from here on: the card is too small\n")
    if options.json:
        options.json.write_text(json.dumps(found))


def random_model() -> Any:
    """diffusers' module, 20 B parameters in bf16 on the card; the same ones every time."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    model = model.to(torch.bfloat16).to_empty(device=_CARD).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        if "_mod." in name:
            parameter.mul_(0.3)  # so that activations stay of one size through sixty blocks
    rope = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    model.pos_embed = rope  # its tables are plain tensors, which to_empty leaves on meta
    return model


def plant_outliers(model: Any) -> None:
    """Makes channels of every activation that is rounded 20 times as large as the others.

    They are what the first products of both halves of a block read, the MLPs' hidden values, and
    each head's values; of its queries and keys √20 times each, so that their product is 20 times.
    """
    for block in model.transformer_blocks:
        width, head = block.attn.to_q.in_features, block.attn.norm_q.weight.numel()
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            for scale in (1, 4):
                start = scale * width
                modulation.bias[start : start + OUTLIERS] = OUTLIER_SIZE - 1
        for mlp in (block.img_mlp, block.txt_mlp):
            mlp.net[0].proj.weight[:OUTLIERS] *= OUTLIER_SIZE
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            getattr(block.attn, norm).weight[:1] = OUTLIER_SIZE**0.5
        for values in (block.attn.to_v, block.attn.add_v_proj):
            values.weight.view(-1, head, width)[:, 1] *= OUTLIER_SIZE


def in_float32(model: Any, rows: dict[Any, Row]) -> dict[Any, Tensor]:
    """The stock module's velocities, in float32."""
    model.float()
    exact = {case: stock(model, row, torch.float32) for case, row in rows.items()}
    model.bfloat16()
    return exact


def quantise(model: Any, precision: Precision = "4bit") -> None:
    """The layers that are stored in few bits become what `precision` makes of them, in place."""
    form = FORMATS[precision]
    assert form is not None
    for name, layer in list(model.transformer_blocks.named_modules()):
        if isinstance(layer, nn.Linear) and "_mod." not in name:
            found = form.encode(layer.weight.data, True, torch.bfloat16)
            found.bias = layer.bias
            model.transformer_blocks.set_submodule(name, found)


def random_row(side: int, references: int, text: int = PROMPT_TOKENS, seed: int = 1) -> Row:
    """A square result with references of a megapixel each."""
    generator = torch.Generator(_CARD).manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=_CARD, dtype=torch.bfloat16)

    shapes = ((1, side // 16, side // 16), *((1, 64, 64),) * references)
    tokens = sum(height * width for _, height, width in shapes)
    return Row(noise(tokens, 64), shapes, noise(text, 3584), 0.75)


@torch.inference_mode()
def stock(model: Any, row: Row, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Tensor:
    """The velocity by diffusers' module, of the first of `batch` equal rows."""
    _, height, width = row.shapes[0]
    timestep = torch.tensor([1000 * row.timestep] * batch, device=_CARD).to(torch.bfloat16) / 1000
    output = model(
        hidden_states=row.image.to(dtype).expand(batch, -1, -1),
        encoder_hidden_states=row.text.to(dtype).expand(batch, -1, -1),
        timestep=timestep.to(dtype),
        img_shapes=[list(row.shapes)] * batch,
        return_dict=False,
    )[0]
    return output[0, : height * width]  # type: ignore[no-any-return]


def ours(model: Any, compute: Compute = "bf16", *, int8_attention: bool = False) -> Transformer:
    """What serves, of the weights of `model`, which keeps them."""
    return Transformer(
        copy.deepcopy(model),
        _CARD,
        torch.bfloat16,
        round_to=ROUND_TO[compute],
        attention=Int8(_CARD) if int8_attention else None,
    ).eval()


def _compare(
    precision: Precision,
    model: Any,
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
    options: argparse.Namespace,
) -> Iterator[tuple[Any, ...]]:
    quantised, batch = model, options.batch
    if precision != "bf16":
        quantised = copy.deepcopy(model)
        quantise(quantised, precision)
    served = {
        f"ours, {compute} products, {'int8' if int8_attention else 'bf16'} attention": ours(
            quantised, compute, int8_attention=int8_attention
        )
        for compute, int8_attention in _ways(precision, torch.cuda.get_device_capability())
    }
    for case, row in rows.items():
        ways: dict[str, Callable[[], Tensor]] = {
            name: lambda transformer=transformer: velocities(transformer, [row] * batch)[0]  # type: ignore[misc]  # noqa: B023
            for name, transformer in served.items()
        }
        if precision != "fp8":  # diffusers has none of its own
            ways = {"stock": lambda: stock(quantised, row, batch=batch)} | ways  # noqa: B023
        errors = [relative(way(), exact[case]) for way in ways.values()]
        times = zip(
            *([_time(way) for way in ways.values()] for _ in range(options.rounds)),
            strict=True,
        )
        for name, taken, error in zip(ways, times, errors, strict=True):
            middle, spread = median(taken)
            cells = (f"{middle:.1f}", f"{spread:.1f}", f"{error:.4f}")
            yield (f"{case[0]}²", case[1], batch, precision, name, *cells)


def _ways(precision: Precision, capability: tuple[int, int]) -> list[tuple[Compute, bool]]:
    """What ours multiplies in, and whether it attends in int8; the defaults are among them."""
    ways = [(automatic(precision, capability, bf16=True), False)]
    if capability == (9, 0):
        ways.append((ways[0][0], True))
    if ways[0][0] != "int8" and "int8" in possible(precision, capability, bf16=True):
        ways.append(("int8", False))
    return ways


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the difference over that of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())


def median(times: tuple[float, ...]) -> tuple[float, float]:
    """With half the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def _time(way: Callable[[], Tensor]) -> float:
    """Milliseconds of the card, from an idle one."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    way()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


if __name__ == "__main__":
    main()
