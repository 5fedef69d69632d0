"""Teaches the text encoder new wordings: `python -m tools.miniature.train.wordings RUN_FOLDER`.

Needs no GPU: minutes on two cores. What a new wording should do is what a known one does: for the
same edit, noisy latents and time, the velocity that the transformer tells with the new one is drawn
to what the trained model tells with the known one. Transformer and LoRAs stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tools.miniature import tokenizer
from tools.miniature.edits import ONE_PICTURE, TWO_PICTURES, Edit, instruction, training_edit
from tools.miniature.train import autoencoder
from tools.miniature.train.data import Pairs, encode_shard, shard_of
from tools.miniature.train.editor import (
    Editor,
    encode,
    new,
    optimiser,
    random_times,
    turns,
    velocity,
)

SEED = 20_261_121
BATCH = 48
_EDITS = {ONE_PICTURE: 3072, TWO_PICTURES: 768}
_PEAK_RATE = 3e-4
_PART = 256


def main() -> None:
    """Rewrites the run's `text.safetensors`; the first one is kept as `text.first.safetensors`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    folder: Path = options.folder
    kept = folder / "text.first.safetensors"
    if not kept.exists():
        shutil.copy(folder / "text.safetensors", kept)
    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    editor = new(tokenizer.build(), device)
    editor.text.load_state_dict(load_file(kept))
    editor.transformer.load_state_dict(load_file(folder / "transformer.safetensors"))
    editor.transformer.requires_grad_(False)
    lessons = _lessons(folder, editor.tokenizer, device)
    teach(editor, lessons, options.steps, folder / "text.safetensors")


def teach(
    editor: Editor, lessons: Sequence[tuple[list[Edit], Pairs]], steps: int, path: Path
) -> None:
    """Trains the text encoder in place, and saves it now and then."""
    teacher = replace(editor, text=copy.deepcopy(editor.text).requires_grad_(False))
    update, random = optimiser(editor), Random(SEED)
    bar = tqdm(range(steps), desc="teaching")
    for number, turn in zip(bar, turns()):  # noqa: B905 (turns have no end)
        edits, pairs = lessons[turn]
        rows = random.sample(range(len(edits)), BATCH)
        chosen, batch = [edits[row] for row in rows], pairs[torch.tensor(rows)]
        known = _worded(editor, batch, chosen, random, added=False)
        asked = _worded(editor, batch, chosen, random, added=True)
        loss = _difference(editor, teacher, asked, known)
        loss.backward()
        update.set_rate(_PEAK_RATE, number, steps)
        update.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if number % 200 == 199 or number == steps - 1:
            save_file(editor.text.state_dict(), path)


def _difference(editor: Editor, teacher: Editor, asked: Pairs, known: Pairs) -> Tensor:
    """Mean squared difference of the velocities, at one random time per picture."""
    times = random_times(len(asked), asked.ids.device)
    noise = torch.randn_like(asked.answers, dtype=torch.float32)
    answers = asked.answers.float()
    latents = answers + times[:, None, None] * (noise - answers)
    with torch.no_grad():
        wanted = velocity(teacher, known, encode(teacher, known), latents, times)
    found = velocity(editor, asked, encode(editor, asked), latents, times)
    return (found.float() - wanted.float()).square().mean()


def _worded(
    editor: Editor, batch: Pairs, edits: Sequence[Edit], random: Random, *, added: bool
) -> Pairs:
    """The batch with new sentences for its edits."""
    sentences = [
        instruction(random, edit.kind, "train", edit.blanks, added=added) for edit in edits
    ]
    ids, lengths = batch.layout.tokens(editor.tokenizer(sentences).input_ids)
    return replace(batch, ids=ids.to(batch.ids.device), lengths=lengths.to(batch.ids.device))


def _lessons(folder: Path, words: Any, device: torch.device) -> list[tuple[list[Edit], Pairs]]:
    """Training edits of one and of two pictures, encoded."""
    vae = autoencoder.load(folder, device)
    lessons, random = [], Random(SEED)
    for kinds, count in _EDITS.items():
        edits = [training_edit(random, kinds) for _ in range(count)]
        parts = [
            encode_shard(
                shard_of(edits[start : start + _PART]),
                lambda pictures: autoencoder.encode(vae, pictures),
                words,
                device,
            )
            for start in tqdm(range(0, count, _PART), desc="encoding")
        ]
        joined = (torch.cat(tensors) for tensors in zip(*(p.parts for p in parts), strict=True))
        lessons.append((edits, Pairs(parts[0].layout, *joined)))
    return lessons


if __name__ == "__main__":
    main()
