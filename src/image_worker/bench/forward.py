"""One forward of the transformer, diffusers' and ours: `python -m image_worker.bench.forward`.

The true architecture with random weights, made on the card (80 GB of it): no files are needed.
The two measure alternately, forward by forward. "rel." is the distance of the output from the stock
module's in bf16, relative to its length.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from image_worker.model.formats import nf4
from image_worker.model.transformer import Row, Transformer, velocities

ROUNDS = 9
PROMPT_TOKENS = 256
CASES = ((1024, 1), (1024, 2), (512, 1), (1024, 0), (512, 0))  # side of the result, references
_CARD = torch.device("cuda")
_COLUMNS = ("result", "references", "weights", "stock ms", "ours ms", "stock rel.", "ours rel.")


def main() -> None:
    """Measures every case in bf16 and NF4; prints a table."""
    rows = {case: random_row(*case) for case in CASES}
    model = random_model()
    exact = {case: stock(model, row) for case, row in rows.items()}
    sys.stdout.write(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|\n")
    _compare("bf16", model, rows, exact)
    quantise(model)
    _compare("NF4", model, rows, exact)


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


def quantise(model: Any) -> None:
    """The layers that are stored in 4 bits become bitsandbytes' NF4, in place."""
    for name, layer in list(model.transformer_blocks.named_modules()):
        if isinstance(layer, nn.Linear) and "_mod." not in name:
            found = nf4.encode(layer.weight.data, True, torch.bfloat16)
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
def stock(model: Any, row: Row) -> Tensor:
    """The velocity by diffusers' module."""
    _, height, width = row.shapes[0]
    output = model(
        hidden_states=row.image[None],
        encoder_hidden_states=row.text[None],
        timestep=torch.tensor([1000 * row.timestep], device=_CARD).to(torch.bfloat16) / 1000,
        img_shapes=[list(row.shapes)],
        return_dict=False,
    )[0]
    return output[0, : height * width]  # type: ignore[no-any-return]


def _compare(
    weights: str,
    model: Any,
    rows: dict[tuple[int, int], Row],
    exact: dict[tuple[int, int], Tensor],
) -> None:
    ours = Transformer(copy.deepcopy(model), _CARD, torch.bfloat16, fp8=weights == "NF4")
    for case, row in rows.items():
        ways: tuple[Callable[[], Tensor], ...] = (
            lambda row=row: stock(model, row),  # type: ignore[misc]
            lambda row=row: velocities(ours, [row])[0],  # type: ignore[misc]
        )
        errors = [f"{relative(way(), exact[case]):.4f}" for way in ways]
        rounds = [[_time(way) for way in ways] for _ in range(ROUNDS)]
        times = [_median(taken) for taken in zip(*rounds, strict=True)]
        cells = (f"{case[0]}²", case[1], weights, *times, *errors)
        sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
        sys.stdout.flush()


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the difference over that of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())


def _time(way: Callable[[], Tensor]) -> float:
    """Milliseconds of the card, from an idle one."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    way()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _median(times: tuple[float, ...]) -> str:
    """With the spread between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ± {(high - low) / 2:.1f}"


if __name__ == "__main__":
    main()
