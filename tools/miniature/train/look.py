"""Looking at a model in training: which held-out edits it passes, and a sheet of its pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.miniature.edits import ONE_PICTURE, Edit
from tools.miniature.score import Verdict, in_style, judge, psnr
from tools.miniature.sheet import save_sheet
from tools.miniature.train import autoencoder
from tools.miniature.train.data import Drawn, Pairs, draw_shard, encode_shard, shard_of
from tools.miniature.train.editor import Editor, sample


class Examination:
    """Edits, drawn and encoded once, for any number of looks."""

    def __init__(
        self, edits: Sequence[Edit], vae: Any, tokenizer: Any, device: torch.device
    ) -> None:
        self._vae = vae
        single = [edit for edit in edits if edit.kind in ONE_PICTURE]
        double = [edit for edit in edits if edit.kind not in ONE_PICTURE]
        self._parts: list[tuple[list[Edit], Drawn, Pairs, Drawn]] = []
        for part in (single, double):
            shard = shard_of(part)
            pairs = encode_shard(shard, self._encode, tokenizer, device)
            drawn = draw_shard(shard, device)
            self._parts.append((part, drawn, pairs, draw_shard(shard, device, style=True)))

    def _encode(self, pictures: Tensor) -> Tensor:
        return autoencoder.encode(self._vae, pictures)

    def reconstruction(self) -> float:
        """The autoencoder's median PSNR on the answers, dB."""
        drawn = [part[1].answers for part in self._parts]
        decoded = [autoencoder.decode(self._vae, self._encode(pictures)) for pictures in drawn]
        return psnr(torch.cat(decoded), torch.cat(drawn)).median().item()

    def results(self, editor: Editor, levels: Sequence[float], scale: float = 1.0) -> list[Tensor]:
        """Edited pictures, of each part, from fixed noise."""
        pictures = []
        for _, _, pairs, _ in self._parts:
            generator = torch.Generator(pairs.answers.device).manual_seed(0)
            noise = torch.randn(
                pairs.answers.shape, generator=generator, device=pairs.answers.device
            )
            latents = sample(editor, pairs, levels, noise, scale=scale)
            pictures.append(autoencoder.decode(self._vae, latents))
        return pictures

    def verdicts(self, results: Sequence[Tensor]) -> dict[str, list[Verdict]]:
        """By kind of edit."""
        found = defaultdict(list)
        for (edits, drawn, _, _), pictures in zip(self._parts, results, strict=True):
            verdicts = judge(drawn.shown[:, 0], drawn.answers, pictures)
            for edit, verdict in zip(edits, verdicts, strict=True):
                found[edit.kind].append(verdict)
        return dict(found)

    def styled(self, results: Sequence[Tensor]) -> float:
        """How many results are in the style of the style LoRA, in percent."""
        found = []
        for (_, drawn, _, styled), pictures in zip(self._parts, results, strict=True):
            found += in_style(drawn.answers, styled.answers, pictures)
        return 100 * sum(found) / len(found)

    def sheet(self, results: Sequence[Tensor], path: Path, per_kind: int = 4) -> None:
        """Saves a picture with, per kind, a few edits: shown, (reference,) answer, result."""
        rows: dict[str, list[tuple[str, list[Tensor]]]] = defaultdict(list)
        for (edits, drawn, _, _), pictures in zip(self._parts, results, strict=True):
            verdicts = judge(drawn.shown[:, 0], drawn.answers, pictures)
            for index, edit in enumerate(edits):
                if len(rows[edit.kind]) < per_kind:
                    mark = "" if verdicts[index].passed else "FAILED "
                    shown = [*drawn.shown[index], drawn.answers[index], pictures[index]]
                    rows[edit.kind].append((mark + edit.instruction, shown))
        save_sheet(list(rows.values()), path)


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """Passed in percent, all and per kind, in one line."""
    everything = [verdict for found in verdicts.values() for verdict in found]
    parts = [f"{kind} {_share(found):.0f}" for kind, found in verdicts.items()]
    return f"passed {_share(everything):.1f} %: {', '.join(parts)}"


def _share(verdicts: Sequence[Verdict]) -> float:
    return 100 * sum(verdict.passed for verdict in verdicts) / len(verdicts)
