"""Ways to make a forward of the transformer: diffusers' module, and what serves here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from image_worker.bench import ggml
from image_worker.bench.random_lora import random_adapter
from image_worker.bench.random_model import CARD
from image_worker.bench.stock_nf4 import use_bitsandbytes
from image_worker.compute import Compute, automatic, possible
from image_worker.model.attention import Int8
from image_worker.model.transformer import ROUND_TO, Row, Transformer, velocities
from image_worker.settings import Precision

# Of kinds that are no PRECISION_MODE: by which it is chosen what they are multiplied in.
LIKE = dict.fromkeys(ggml.KINDS, "4bit") | {
    "svdq-r128": "svdq",
    "svdq-ranges": "svdq",
    "fp8-file": "fp8",
}
NOT_STOCK = ("fp8", "fp8-file", "svdq", "svdq-r128", "svdq-ranges")  # diffusers has no such layers
Choice = tuple[Compute, bool]  # what ours multiplies in, and whether it attends in int8
Extent = Literal["all ways", "stock and ours", "ours alone"]
EXTENTS: tuple[Extent, ...] = ("all ways", "stock and ours", "ours alone")


@dataclass(frozen=True)
class Way:
    """One way to make a forward. weights: bytes on the card."""

    kind: str
    how: str
    run: Callable[[Sequence[Row]], Sequence[Tensor] | Tensor]
    weights: int


def ways_of(kind: str, model: Any, extent: Extent, lora: int | None) -> list[Way]:
    """The stock module's way first, where diffusers has such layers."""
    weights = on_card(model)
    chosen = _choices(kind, torch.cuda.get_device_capability())
    if extent == "ours alone":
        served = {chosen[0]: _transformer(model, chosen[0])}
    else:
        chosen = chosen if extent == "all ways" else chosen[:1]
        served = {way: ours(model, *way) for way in chosen}
    found = []
    if kind not in NOT_STOCK and extent != "ours alone":
        use_bitsandbytes(model.transformer_blocks, torch.bfloat16)
        ggml.use_diffusers(model.transformer_blocks, torch.bfloat16)
        found.append(Way(kind, "stock", functools.partial(stock, model), weights))
    for (compute, int8), transformer in served.items():
        how = f"ours, {compute} products, {'int8' if int8 else 'bf16'} attention"
        run = functools.partial(velocities, transformer)
        found.append(Way(kind, how, run, on_card(transformer)))
        if lora:
            adapter = random_adapter(transformer, lora)
            run = functools.partial(velocities, transformer, adapter=adapter)
            weights = on_card(transformer) + adapter.nbytes
            found.append(Way(kind, f"{how}, a LoRA of rank {lora}", run, weights))
    return found


def on_card(module: Any) -> int:
    """Bytes of a module's tensors on the card."""
    tensors = (*module.parameters(), *module.buffers())
    storages = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.is_cuda}
    return sum(storages.values())


def _choices(kind: str, capability: tuple[int, int]) -> list[Choice]:
    """What ours multiplies in, and whether it attends in int8; first what it does by default."""
    like = cast("Precision", LIKE.get(kind, kind))
    hopper = capability == (9, 0)
    compute = automatic(like, capability, bf16=True)
    ways: list[Choice] = [(compute, True), (compute, False)] if hopper else [(compute, False)]
    if compute != "int8" and "int8" in possible(like, capability, bf16=True):
        ways.append(("int8", hopper))
    return ways


@torch.inference_mode()
def stock(model: Any, rows: Sequence[Row], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Velocities by diffusers' module, (rows, tokens, channels), of rows that are all alike."""
    row, batch = rows[0], len(rows)
    _, height, width = row.shapes[0]
    timestep = torch.tensor([1000 * row.timestep] * batch, device=CARD).to(torch.bfloat16) / 1000
    output = model(
        hidden_states=torch.stack([row.image.to(dtype) for row in rows]),
        encoder_hidden_states=torch.stack([row.text.to(dtype) for row in rows]),
        timestep=timestep.to(dtype),
        img_shapes=[list(row.shapes)] * batch,
        return_dict=False,
    )[0]
    return output[:, : height * width]  # type: ignore[no-any-return]


def ours(model: Any, compute: Compute = "bf16", int8_attention: bool = False) -> Transformer:
    """What serves, of the weights of `model`, which keeps them; those of modulation are shared."""
    layers = [
        layer for block in model.transformer_blocks for layer in (block.img_mod, block.txt_mod)
    ]
    taken_apart = copy.deepcopy(model, memo={id(layer): layer for layer in layers})
    return _transformer(taken_apart, (compute, int8_attention))


def _transformer(model: Any, way: Choice) -> Transformer:
    compute, int8_attention = way
    attention = Int8(CARD) if int8_attention else None
    round_to = ROUND_TO[compute]
    made = Transformer(model, CARD, torch.bfloat16, round_to=round_to, attention=attention)
    return made.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    """The length of the difference over that of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())
