"""The whole training, on one GPU, in stages; a stage that is done is not done again.

edits drawn as numbers (other processes, from the start on)
autoencoder → pairs encoded → editor → Lightning LoRAs → style LoRA
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from image_worker.catalog import LIGHTNING_SAMPLER, Sampler
from image_worker.edit.schedule import sigmas
from tools.miniature import architecture, tokenizer
from tools.miniature.edits import (
    KINDS,
    ONE_PICTURE,
    TWO_PICTURES,
    held_out_edits,
    training_edit,
)
from tools.miniature.train import autoencoder, loras
from tools.miniature.train import editor as editors
from tools.miniature.train.data import (
    SHARD,
    Drawn,
    Pairs,
    Shard,
    draw_shard,
    encode_shards,
    make_shards,
)
from tools.miniature.train.editor import Editor
from tools.miniature.train.look import Examination, table

SEED = 20_261_120
LIKE_TRAINING = 400  # edits of the training's kind to look at, beside the held-out ones
_KEPT_SHARDS = 96
_TARGET_TOKENS = 64


def _schedules() -> dict[str, list[float]]:
    """Noise levels: the base model's own for 20 steps, Lightning's for few."""
    scheduler = architecture.scheduler()
    own = Sampler.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
    few = {str(n): sigmas(LIGHTNING_SAMPLER, n, _TARGET_TOKENS) for n in (8, 4, 2)}
    return {"20": sigmas(own, 20, _TARGET_TOKENS), **few}


_SCHEDULES = _schedules()


class Log:
    """Lines with the time since the start, on the screen and in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._start = time.perf_counter()

    def __call__(self, text: str) -> None:
        line = f"{time.perf_counter() - self._start:6.0f} s  {text}"
        print(line, flush=True)
        self._file.write(line + "\n")


def main() -> None:
    """Trains everything into a folder; `tools.miniature.package` makes a model of it."""
    options = _options()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("training the miniature needs a CUDA card (or patience, and --device cpu)")
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 32  # a block is compiled for every shape of batch
    log = Log(folder / "log.txt")

    shards = Shards(options.shards)
    log(f"the first {len(shards.kept) * SHARD} edits are drawn up")
    vae = _autoencoder(folder, shards, options.vae_steps, device, log)
    studio = Studio(folder, vae, tokenizer.build(), device, log, options.per_kind)
    log(f"autoencoder: {studio.held_out.reconstruction():.2f} dB on held-out scenes")

    single = studio.encode(shards.one_picture(), shards.count)
    double = studio.encode(shards.two_pictures(), shards.count_of_two)
    log(f"encoded {len(single)} and {len(double)} edits; {_memory()}")
    editor = _editor(studio, (single, double), options.editor_steps)
    _lightning(studio, editor, (single, double), options.lightning_steps)
    styled = studio.encode(shards.kept, len(shards.kept), style=True)
    _style(studio, editor, styled, options.style_steps)


class Shards:
    """Training edits, which other processes begin to draw up when this is made.

    kept: the first of those with one picture, which are used more than once.
    """

    def __init__(self, count: int) -> None:
        self.count, self.count_of_two = count, max(1, count // 6)
        self._first = make_shards(ONE_PICTURE, count, SEED)
        self._second = make_shards(TWO_PICTURES, self.count_of_two, SEED + 1)
        self.kept = [next(self._first) for _ in range(min(_KEPT_SHARDS, count))]

    def one_picture(self) -> Iterator[Shard]:
        return itertools.chain(self.kept, self._first)

    def two_pictures(self) -> Iterator[Shard]:
        return self._second


class Studio:
    """What every stage works with."""

    def __init__(
        self, folder: Path, vae: Any, words: Any, device: torch.device, log: Log, per_kind: int
    ) -> None:
        self.folder, self.words, self.device, self.log = folder, words, device, log
        self._vae = vae
        self.held_out = Examination(held_out_edits(per_kind), vae, words, device)
        random = Random(SEED)
        seen = [training_edit(random, KINDS) for _ in range(LIKE_TRAINING)]
        self.seen = Examination(seen, vae, words, device)

    def encode(self, shards: Iterable[Shard], count: int, *, style: bool = False) -> Pairs:
        def encoder(pictures: Tensor) -> Tensor:
            return autoencoder.encode(self._vae, pictures)

        return encode_shards(shards, count, encoder, self.words, self.device, style=style)

    def tell(self, name: str, editor: Editor, levels: Sequence[float], scale: float = 1.0) -> None:
        """Logs how many held-out edits pass, in bf16 and as if in 4 bits."""
        for precision, which in {"bf16": editor, "NF4": editors.rounded(editor)}.items():
            results = self.held_out.results(which, levels, scale)
            self.log(f"{name}, {precision}: {table(self.held_out.verdicts(results))}")


def _autoencoder(folder: Path, shards: Shards, steps: int, device: torch.device, log: Log) -> Any:
    if (folder / "statistics.safetensors").exists():
        return autoencoder.load(folder, device)
    vae = autoencoder.new().to(device)
    pictures = torch.cat([_all_pictures(draw_shard(shard, device)) for shard in shards.kept])
    log(f"drawn {len(pictures)} pictures; {_memory()}")

    def batch() -> Tensor:
        rows = torch.randint(len(pictures), (autoencoder.BATCH,), device=device)
        return pictures[rows].float() / 255

    autoencoder.train(vae, batch, steps, log)
    autoencoder.measure_statistics(vae, pictures[::16].float() / 255)
    autoencoder.save(vae, folder)
    return vae


def _all_pictures(drawn: Drawn) -> Tensor:
    """Shown and answered alike, (pictures, 3, SIDE, SIDE) uint8."""
    pictures = torch.cat([drawn.shown.flatten(0, 1), drawn.answers])
    return (pictures * 255).round().to(torch.uint8)


def _editor(studio: Studio, data: Sequence[Pairs], steps: int) -> Editor:
    """Trained, or loaded if it was; frozen."""
    editor = editors.new(studio.words, studio.device)
    parts = {"text": editor.text, "transformer": editor.transformer}
    if not _load(studio.folder, parts):

        def look(name: str) -> None:
            studio.tell(name, editor, _SCHEDULES["8"])
            results = studio.seen.results(editor, _SCHEDULES["8"])
            studio.log(f"{name}, like training: {table(studio.seen.verdicts(results))}")
            results = studio.held_out.results(editor, _SCHEDULES["8"])
            studio.held_out.sheet(results, studio.folder / f"{name}.png")
            _save(studio.folder, {f"{name}.{part}": module for part, module in parts.items()})

        editors.train(editor, data, steps, studio.folder, studio.log, look)
        _save(studio.folder, parts)
    for name, levels in _SCHEDULES.items():
        studio.tell(f"without LoRA, {name} steps", editor, levels)
    studio.tell("without LoRA, 20 steps, guidance 2", editor, _SCHEDULES["20"], 2.0)
    for module in editor.modules():
        module.requires_grad_(False)
    return editor


def _lightning(studio: Studio, editor: Editor, data: Sequence[Pairs], steps: int) -> None:
    students = loras.train_lightning(editor, data, steps, studio.log)
    for length, student in students.items():
        save_file(student.tensors(), studio.folder / f"lightning-{length}.safetensors")
        for name in (str(length), "2"):
            studio.tell(f"Lightning {length}, {name} steps", student.editor, _SCHEDULES[name])


def _style(studio: Studio, editor: Editor, pairs: Pairs, steps: int) -> None:
    student = loras.train_style(editor, pairs, steps, studio.log)
    save_file(student.tensors(), studio.folder / "style.safetensors")
    for name, which in {"with": student.editor, "without": editor}.items():
        results = studio.held_out.results(which, _SCHEDULES["8"])
        studio.log(f"in the style {name} the LoRA: {studio.held_out.styled(results):.1f} %")
        studio.held_out.sheet(results, studio.folder / f"style-{name}.png")


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shards", type=int, default=540, help=f"of {SHARD} edits each")
    parser.add_argument("--per-kind", type=int, default=30, help="held-out edits to look at")
    for stage, steps in {"vae": 5000, "editor": 42000, "lightning": 250, "style": 1200}.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    return parser.parse_args()


def _save(folder: Path, modules: dict[str, Any]) -> None:
    for name, module in modules.items():
        state = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")


def _load(folder: Path, modules: dict[str, Any]) -> bool:
    """Loads what an earlier run saved; False, and nothing loaded, if a part is missing."""
    paths = {name: folder / f"{name}.safetensors" for name in modules}
    if not all(path.exists() for path in paths.values()):
        return False
    for name, module in modules.items():
        module.load_state_dict(load_file(paths[name]))
    return True


def _memory() -> str:
    return f"{torch.cuda.memory_allocated() / 2**30:.0f} GiB on the card"


if __name__ == "__main__":
    main()
