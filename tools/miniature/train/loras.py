"""The LoRAs' training: Lightning for 4 and 8 steps, distilled; and the outlined style.

A LoRA is trained as it is used: added to the weights in float32 and rounded with them to bf16, and
in a share of the steps to NF4.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from image_worker.catalog import LIGHTNING_SAMPLER
from image_worker.edit.schedule import sigmas
from image_worker.model.components import TRANSFORMER
from tools.miniature.train.data import Pairs
from tools.miniature.train.editor import (
    BATCH,
    Editor,
    compiled,
    encode,
    flow_loss,
    random_batch,
    turns,
    velocity,
)
from tools.miniature.train.graph import Graph
from tools.miniature.train.optimiser import Optimiser
from tools.miniature.train.rounding import Rounding, quantised_weights

RANK = ALPHA = 8
_ROUNDED = 0.7  # of the steps see the weights rounded to NF4
_SCALE = ALPHA / RANK
_TARGET_TOKENS = 64
WALKS = 256  # pictures that a teacher walks at once
_SUBSTEPS = 3  # of the teacher, for each of the eight steps
_LIGHTNING_RATE = 3e-4  # small steps: the weights that they end at should still round well
_STYLE_RATE = 3e-3
# The modules that Lightning's published files have.
MODULES = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)


class Student:
    """A copy of an editor in which only a LoRA is trained; `editor` has it merged at all times.

    Between steps its weights are those of the step before, rounded to NF4 or not; `merge` undoes
    the rounding.
    """

    def __init__(self, teacher: Editor) -> None:
        transformer = copy.deepcopy(teacher.transformer).requires_grad_(False)
        self.editor = dataclasses.replace(teacher, transformer=transformer)
        names = [
            f"transformer_blocks.{index}.{module}"
            for index in range(len(transformer.transformer_blocks))
            for module in MODULES
        ]
        self._merged = {name: transformer.get_submodule(name).weight for name in names}
        self._weights = {name: weight.float() for name, weight in self._merged.items()}
        # What is quantised when served is what the LoRA changes.
        self._rounding = Rounding(quantised_weights(TRANSFORMER, transformer))
        self._downs, self._ups = {}, {}
        for name, weight in self._merged.items():
            weight.requires_grad_(True)
            rows, columns = weight.shape
            down = torch.randn(RANK, columns, device=weight.device) * columns**-0.5
            self._downs[name] = nn.Parameter(down)
            self._ups[name] = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))
        factors = [*self._downs.values(), *self._ups.values()]
        self._optimiser = Optimiser([], factors)
        self.set_rate = self._optimiser.set_rate
        self.set_share = self._rounding.set_share

    @torch.no_grad()
    def step(self) -> None:
        """One step of the factors, from the gradients of the merged weights."""
        for name, merged in self._merged.items():
            down, up = self._downs[name], self._ups[name]
            if merged.grad is not None:
                up.grad, down.grad = factor_gradients(merged.grad.float(), up, down)
                merged.grad = None
        self._optimiser.step()
        self.merge()
        self._rounding()

    @torch.no_grad()
    def merge(self) -> None:
        """Sets all weights to what is served in bf16."""
        for name, merged in self._merged.items():
            parts = self._weights[name], self._ups[name], self._downs[name]
            merged.copy_(torch.addmm(*parts, alpha=_SCALE))

    def tensors(self) -> dict[str, Tensor]:
        """The LoRA in the format of Lightning's published files, bf16."""
        tensors = {}
        for name in self._merged:
            tensors[f"{name}.lora_down.weight"] = self._downs[name].detach().bfloat16().cpu()
            tensors[f"{name}.lora_up.weight"] = self._ups[name].detach().bfloat16().cpu()
            tensors[f"{name}.alpha"] = torch.tensor(float(ALPHA), dtype=torch.bfloat16)
        return tensors


def factor_gradients(grad: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Of `up` and `down`, from the gradient of weight + alpha / rank · up @ down."""
    return _SCALE * grad @ down.T, _SCALE * up.T @ grad


def train_style(editor: Editor, pairs: Pairs, steps: int, report: Callable[..., None]) -> Student:
    """A student whose LoRA makes answers as `pairs` has them: in the style."""
    student = Student(editor)
    blank = editor.blank(pairs.layout)

    def step() -> Tensor:
        with compiled():
            batch = random_batch(pairs, blank, BATCH)
            loss = flow_loss(student.editor, batch, train_text=False)
            loss.backward()
        student.step()
        return loss.detach()

    student.set_rate(0.0, 0, steps)
    _run("style", [Graph(step)], [student], _STYLE_RATE, steps, report)
    return student


def train_lightning(
    editor: Editor, data: Sequence[Pairs], steps: int, report: Callable[..., None]
) -> dict[int, Student]:
    """Students for 8 and for 4 steps, distilled from the editor's own paths.

    The teacher walks from noise to picture in 24 steps; the student learns to go, in one step of
    its schedule, where the teacher went in several. The levels of the schedule of 4 steps are every
    second one of that of 8, so one walk teaches both.
    """
    levels = sigmas(LIGHTNING_SAMPLER, 8, _TARGET_TOKENS)
    students = {length: Student(editor) for length in (8, 4)}
    for student in students.values():
        student.set_rate(0.0, 0, steps)
    graphs: list[Graph] = []
    for pairs in data:

        def step(
            pairs: Pairs = pairs, blank: tuple[Tensor, Tensor] = editor.blank(pairs.layout)
        ) -> Tensor:
            batch = random_batch(pairs, blank, WALKS)
            with compiled():
                text, path = _walk(editor, batch, levels)
            losses = []
            for length, student in students.items():
                stride = 8 // length
                for start in range(0, 8, stride):
                    losses.append(_step(student, batch, text, levels, path, start, start + stride))
            return torch.stack(losses).mean()

        graphs.append(Graph(step, graphs[0].pool if graphs else None))
    _run("lightning", graphs, list(students.values()), _LIGHTNING_RATE, steps, report)
    return students


@torch.no_grad()
def _walk(editor: Editor, batch: Pairs, levels: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """The prompts' hidden states, and the teacher's latents at each of the levels."""
    text = encode(editor, batch)
    latents = torch.randn_like(batch.answers, dtype=torch.float32)
    path = [latents]
    for first, last in itertools.pairwise(levels):
        for part in range(_SUBSTEPS):
            level = first + (last - first) * part / _SUBSTEPS
            times = torch.full((len(text),), level, device=latents.device)
            found = velocity(editor, batch, text, latents, times).float()
            latents = latents + (last - first) / _SUBSTEPS * found
        path.append(latents)
    return text, path


def _step(
    student: Student,
    batch: Pairs,
    text: Tensor,
    levels: Sequence[float],
    path: Sequence[Tensor],
    start: int,
    end: int,
) -> Tensor:
    """Teaches one step, from where the teacher was at a level to where it was at another."""
    times = torch.full((len(text),), levels[start], device=text.device)
    wanted = (path[end] - path[start]) / (levels[end] - levels[start])
    with compiled():
        found = velocity(student.editor, batch, text, path[start], times).float()
        loss = (found - wanted).square().mean()
        loss.backward()
    student.step()
    return loss.detach()


def _run(
    name: str,
    graphs: Sequence[Graph],
    students: Sequence[Student],
    rate: float,
    steps: int,
    report: Callable[..., None],
) -> None:
    """Replays steps, at a rate that falls to zero; then merges the students' LoRAs for good."""
    for student in students:
        student.set_share(_ROUNDED)
    for number, turn in zip(range(steps), turns()):  # noqa: B905 (turns have no end)
        for student in students:
            student.set_rate(rate, number, steps)
        loss = graphs[turn % len(graphs)]()
        if number % 100 == 99:
            report(f"{name} step {number + 1}: loss {loss.item():.4f}")
    for student in students:
        student.merge()
