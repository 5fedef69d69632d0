"""The editing model's training: text encoder and transformer together, by flow matching.

A latent picture x on the straight line between the answer and noise, x = (1 - t)·answer + t·noise,
moves along it with the velocity noise - answer, which the transformer learns to tell from x, t, the
picture shown and the instruction (Lipman et al., 2023; Esser et al., 2024).
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.model import components
from tools.miniature import architecture, forward
from tools.miniature.train import transformer as dual_stream
from tools.miniature.train.data import Pairs
from tools.miniature.train.graph import Graph
from tools.miniature.train.optimiser import Optimiser
from tools.miniature.train.rounding import Rounding, quantised_weights
from tools.miniature.train.rounding import served as served_nf4

BATCH = 512
_PEAK_RATE = 2e-3
_ROUNDED = 0.5  # of the steps, once a part of them is over, see the weights rounded to NF4
_ROUNDED_AFTER = 1 / 3
_WITHOUT_INSTRUCTION = 0.05  # of the prompts are empty, for classifier-free guidance
LOOK_EVERY = 5000  # steps
_REPORT_EVERY = 1000
_SIDE = 8  # tokens


@dataclass(frozen=True)
class Editor:
    """text: a `Qwen2_5_VLModel`; transformer: a `QwenImageTransformer2DModel`; both bf16.

    colours: mean and deviation, (3), that the text encoder's pixels are normalised by;
    ropes: the transformer's rotary embeddings, by number of pictures.
    """

    text: Any
    transformer: Any
    tokenizer: Any
    colours: tuple[Tensor, Tensor]
    ropes: dict[int, tuple[Tensor, Tensor]]

    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.text, self.transformer

    def quantised_weights(self) -> list[Tensor]:
        """The weights that are quantised when served."""
        return [
            *quantised_weights(components.TEXT_ENCODER, self.text),
            *quantised_weights(components.TRANSFORMER, self.transformer),
        ]

    def blank(self, layout: forward.Layout) -> tuple[Tensor, Tensor]:
        """Ids and length of an empty instruction (a space, as when served)."""
        ids, lengths = layout.tokens([self.tokenizer(" ").input_ids])
        return ids.to(layout.pads.device), lengths.to(layout.pads.device)


def new(tokenizer: Any, device: torch.device) -> Editor:
    """Random weights, but for what starts as zero: each block begins as the identity."""
    text = architecture.text_encoder(tokenizer).model
    transformer = architecture.transformer()
    for name, parameter in transformer.named_parameters():
        if "_mod." in name or name.startswith(("proj_out.", "norm_out.")):
            nn.init.zeros_(parameter)
    text, transformer = (module.to(device, torch.bfloat16) for module in (text, transformer))
    return of(text, transformer, tokenizer)


def of(text: Any, transformer: Any, tokenizer: Any) -> Editor:
    """An editor of modules that there are."""
    device = transformer.device
    processor = architecture.image_processor()
    mean, deviation = (
        torch.tensor(values, device=device)
        for values in (processor.image_mean, processor.image_std)
    )
    ropes = {}
    for pictures in (1, 2):
        length = forward.layout(tokenizer, pictures, device).kept
        image, words = transformer.pos_embed(
            [[(1, _SIDE, _SIDE)] * (1 + pictures)], device=device, max_txt_seq_len=length
        )
        ropes[pictures] = (image[None], words[None])
    return Editor(text, transformer, tokenizer, (mean, deviation), ropes)


def rounded(editor: Editor) -> Editor:
    """A copy as it would be served in 4 bits."""
    text, transformer = copy.deepcopy(editor.text), copy.deepcopy(editor.transformer)
    found = replace(editor, text=text, transformer=transformer)
    with torch.no_grad():
        for weight in found.quantised_weights():
            weight.copy_(served_nf4(weight.data))
    return found


def encode(editor: Editor, batch: Pairs) -> Tensor:
    """The prompts' hidden states, (B, tokens, width)."""
    return _encode(editor.text, batch.layout, batch.ids, batch.seen, editor.colours)


def _encode(
    text: Any, layout: forward.Layout, ids: Tensor, seen: Tensor, colours: tuple[Tensor, Tensor]
) -> Tensor:
    patches = forward.patches(seen.flatten(0, 1) / 255, *colours)
    return forward.encode_text(text, layout, ids, patches.bfloat16())


def velocity(editor: Editor, batch: Pairs, text: Tensor, latents: Tensor, time: Tensor) -> Tensor:
    """What the transformer says of latents (B, tokens, channels) at times (B) in [0, 1]."""
    tokens, device = latents.shape[1], latents.device
    image = torch.cat([latents.bfloat16(), batch.shown], dim=1)
    valid = torch.arange(text.shape[1], device=device) < batch.lengths[:, None]
    everywhere = torch.ones(len(text), image.shape[1], dtype=torch.bool, device=device)
    ropes = editor.ropes[batch.layout.pictures]
    rows = dual_stream.Packed(
        image=image,
        text=text,
        timestep=(1000 * time).bfloat16() / 1000,  # rounded as when served
        image_rope=ropes[0],
        text_rope=ropes[1],
        mask=torch.cat([valid, everywhere], dim=1)[:, None, None, :],
    )
    return dual_stream.velocities(editor.transformer, rows)[:, :tokens]


@contextmanager
def compiled() -> Iterator[None]:
    """Within it, the transformer's blocks and the text encoder run compiled.

    Blocks are compiled one by one (they share the result), and turn by real numbers, since the
    compiler leaves complex ones alone.
    """
    ours, originals = globals(), (dual_stream._block, dual_stream._rotate, _encode)
    dual_stream._block, dual_stream._rotate, ours["_encode"] = (
        _COMPILED_BLOCK,
        _rotate,
        _COMPILED_ENCODE,
    )
    try:
        yield
    finally:
        dual_stream._block, dual_stream._rotate, ours["_encode"] = originals


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = torch.view_as_real(rope)[:, :, None].unbind(-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(3).type_as(x)


_COMPILED_BLOCK = torch.compile(dual_stream._block, dynamic=False)
_COMPILED_ENCODE = torch.compile(_encode, dynamic=False)


def flow_loss(editor: Editor, batch: Pairs, *, train_text: bool = True) -> Tensor:
    """Mean squared error of the velocity, at one random time per picture."""
    with torch.set_grad_enabled(train_text):
        text = encode(editor, batch)
    times = random_times(len(text), text.device)
    noise = torch.randn_like(batch.answers, dtype=torch.float32)
    answers = batch.answers.float()
    latents = answers + times[:, None, None] * (noise - answers)
    found = velocity(editor, batch, text, latents, times)
    return (found.float() - (noise - answers)).square().mean()


def random_times(count: int, device: torch.device) -> Tensor:
    """Mostly where Lightning's shift of 3 puts its steps: the answer is decided in the noise."""
    times = torch.sigmoid(torch.randn(count, device=device))
    times = 3 * times / (1 + 2 * times)
    anywhere = torch.rand(count, device=device) < 0.2
    return torch.where(anywhere, torch.rand(count, device=device), times)


def random_batch(pairs: Pairs, blank: tuple[Tensor, Tensor], count: int) -> Pairs:
    """`count` random edits, a few of them with an empty instruction. Part of a CUDA graph."""
    device = pairs.ids.device
    batch = pairs[torch.randint(len(pairs), (count,), device=device)]
    empty = torch.rand(count, device=device) < _WITHOUT_INSTRUCTION
    return replace(
        batch,
        ids=torch.where(empty[:, None], blank[0], batch.ids),
        lengths=torch.where(empty, blank[1], batch.lengths),
    )


def turns() -> Iterator[int]:
    """Which set of pairs is next, without end: every seventh time the second, with two pictures."""
    return itertools.cycle([0] * 6 + [1])


def optimiser(editor: Editor) -> Optimiser:
    """Muon for the matrices inside of blocks, AdamW for the rest, of what is not frozen."""
    matrices, others = list[nn.Parameter](), list[nn.Parameter]()
    for module in editor.modules():
        for name, parameter in module.named_parameters():
            inside = "blocks." in name or "layers." in name
            if parameter.requires_grad:
                (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return Optimiser(matrices, others)


def train(
    editor: Editor,
    data: Sequence[Pairs],
    steps: int,
    folder: Path,
    report: Callable[..., None],
    look: Callable[[str], None],
) -> None:
    """Trains in place, going on from the folder's checkpoint if there is one.

    look: called now and then, and at the end, with the weights not rounded.
    """
    update, rounding = optimiser(editor), Rounding(editor.quantised_weights())
    checkpoint, first = folder / "editor.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        update.load(state["optimiser"])
        first = state["step"]
        report(f"going on from step {first}")
    update.set_rate(0.0, 0, steps)  # capturing takes steps, too
    graphs = _capture(editor, data, update, rounding)
    report("training steps are captured")
    total, clock = torch.zeros((), device=data[0].ids.device), time.perf_counter()
    for number, turn in zip(range(first + 1, steps + 1), turns()):  # noqa: B905 (turns do not end)
        update.set_rate(_PEAK_RATE, number - 1, steps)
        rounding.set_share(_ROUNDED if number > _ROUNDED_AFTER * steps else 0.0)
        total += graphs[turn]()
        if number % _REPORT_EVERY == 0:
            mean = total.item() / _REPORT_EVERY
            pace = _REPORT_EVERY / (time.perf_counter() - clock)
            report(f"editor step {number}: loss {mean:.4f}, {pace:.0f} steps/s")
            total.zero_()
        if number % LOOK_EVERY == 0:
            torch.save({"optimiser": update.state(), "step": number}, checkpoint)
            update.write()
            look(f"editor-{number}")
        if number % _REPORT_EVERY == 0:
            clock = time.perf_counter()
    update.write()
    look("editor")


def _capture(
    editor: Editor, data: Sequence[Pairs], update: Optimiser, rounding: Rounding
) -> list[Graph]:
    """A training step for each set of pairs."""
    graphs: list[Graph] = []
    for pairs in data:
        blank = editor.blank(pairs.layout)

        def step(pairs: Pairs = pairs, blank: tuple[Tensor, Tensor] = blank) -> Tensor:
            with compiled():
                loss = flow_loss(editor, random_batch(pairs, blank, BATCH))
                loss.backward()
            update.step()
            rounding()
            return loss.detach()

        graphs.append(Graph(step, graphs[0].pool if graphs else None))
    return graphs


@torch.no_grad()
def sample(
    editor: Editor, batch: Pairs, levels: Sequence[float], noise: Tensor, *, scale: float = 1.0
) -> Tensor:
    """Latents of the edited pictures, by Euler steps through the noise levels."""
    text = encode(editor, batch)
    if scale > 1:
        ids, lengths = editor.blank(batch.layout)
        blank = replace(
            batch, ids=ids.expand_as(batch.ids), lengths=lengths.expand_as(batch.lengths)
        )
        without = encode(editor, blank)
    latents = noise.float()
    for level, following in itertools.pairwise(levels):
        times = torch.full((len(text),), level, device=noise.device)
        found = velocity(editor, batch, text, latents, times).float()
        if scale > 1:
            away = velocity(editor, blank, without, latents, times).float()
            found = away + scale * (found - away)
        latents = latents + (following - level) * found
    return latents
