"""The whole training, on one GPU, in stages; a stage that is done is not done again.

edits drawn as numbers (other processes, from the start on)
autoencoder → pairs encoded → editor → Lightning LoRAs → style LoRA
"""

from __future__ import annotations

import argparse
import sys
import time
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
from tools.miniature.train.data import SHARD, Drawn, Shard, draw_shard, encode_shards, make_shards
from tools.miniature.train.look import Examination, table

SEED = 20_261_120
_VAE_SHARDS = 96
_TARGET_TOKENS = 64


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
    if not torch.cuda.is_available():
        sys.exit("training the miniature needs a CUDA card")
    device = torch.device("cuda")
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 32  # a block is compiled for every shape of batch
    log = Log(folder / "log.txt")
    words = tokenizer.build()

    first = make_shards(ONE_PICTURE, options.shards, SEED)
    second = make_shards(TWO_PICTURES, max(1, options.shards // 6), SEED + 1)
    kept = [next(first) for _ in range(min(_VAE_SHARDS, options.shards))]
    kept_two = [next(second)]
    log(f"the first {len(kept) * SHARD} edits are drawn up")

    vae = _autoencoder(folder, kept + kept_two, options.vae_steps, device, log)
    encoder = lambda pictures: autoencoder.encode(vae, pictures)  # noqa: E731
    exam = Examination(held_out_edits(options.per_kind), vae, words, device)
    random = Random(SEED)
    like_training = [training_edit(random, KINDS) for _ in range(400)]
    easy_exam = Examination(like_training, vae, words, device)
    log(f"autoencoder: {exam.reconstruction():.2f} dB on held-out scenes")

    single = encode_shards((*kept, *first), options.shards, encoder, words, device)
    double = encode_shards(
        (*kept_two, *second), max(1, options.shards // 6), encoder, words, device
    )
    log(f"encoded {len(single)} and {len(double)} edits; {_memory()}")

    editor = editors.new(words, device)
    parts = {"text": editor.text, "transformer": editor.transformer}
    schedules = _schedules()
    if not _load(folder, parts):

        def look(name: str) -> None:
            results = exam.results(editor, schedules["8"])
            log(f"{name}: 8 steps {table(exam.verdicts(results))}")
            seen = easy_exam.verdicts(easy_exam.results(editor, schedules["8"]))
            log(f"{name}: with the colours, words and places of training {table(seen)}")
            exam.sheet(results, folder / f"{name}.png")
            _save(folder, {f"{name}.{part}": module for part, module in parts.items()})

        editors.train(editor, (single, double), options.editor_steps, folder, log, look)
        _save(folder, parts)
    for name, levels in schedules.items():
        for scale in (1.0, 2.0) if name == "20" else (1.0,):
            results = exam.results(editor, levels, scale)
            log(f"base, {name} steps, scale {scale}: {table(exam.verdicts(results))}")

    for module in editor.modules():
        module.requires_grad_(False)
    students = loras.train_lightning(editor, (single, double), options.lightning_steps, log)
    for steps, student in students.items():
        save_file(student.tensors(), folder / f"lightning-{steps}.safetensors")
        for name in (str(steps), "2"):
            results = exam.results(student.editor, schedules[name])
            log(f"lightning for {steps}, {name} steps: {table(exam.verdicts(results))}")

    styled = encode_shards(kept, len(kept), encoder, words, device, style=True)
    student = loras.train_style(editor, styled, options.style_steps, log)
    save_file(student.tensors(), folder / "style.safetensors")
    for name, which in {"with": student.editor, "without": editor}.items():
        results = exam.results(which, schedules["8"])
        log(f"in the style {name} the LoRA: {exam.styled(results):.1f} %")
        exam.sheet(results, folder / f"style-{name}.png")


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=540, help=f"of {SHARD} edits each")
    parser.add_argument("--per-kind", type=int, default=30, help="held-out edits to look at")
    for stage, steps in {"vae": 5000, "editor": 38000, "lightning": 250, "style": 1200}.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    return parser.parse_args()


def _autoencoder(
    folder: Path, shards: list[Shard], steps: int, device: torch.device, log: Log
) -> Any:
    vae = autoencoder.new().to(device)
    if _load(folder, {"vae": vae}):
        return _with_statistics(vae, load_file(folder / "statistics.safetensors"))
    pictures = torch.cat([_all_pictures(draw_shard(shard, device)) for shard in shards])
    log(f"drawn {len(pictures)} pictures; {_memory()}")

    def batch() -> Tensor:
        rows = torch.randint(len(pictures), (autoencoder.BATCH,), device=device)
        return pictures[rows].float() / 255

    autoencoder.train(vae, batch, steps, log)
    autoencoder.measure_statistics(vae, pictures[::16].float() / 255)
    _save(folder, {"vae": vae})
    statistics = {n: torch.tensor(vae.config[n]) for n in ("latents_mean", "latents_std")}
    save_file(statistics, folder / "statistics.safetensors")
    return vae


def _all_pictures(drawn: Drawn) -> Tensor:
    """Shown and answered alike, (pictures, 3, SIDE, SIDE) uint8."""
    pictures = torch.cat([drawn.shown.flatten(0, 1), drawn.answers])
    return (pictures * 255).round().to(torch.uint8)


def _with_statistics(vae: Any, statistics: dict[str, Tensor]) -> Any:
    vae.register_to_config(
        **{name: [round(v, 4) for v in values.tolist()] for name, values in statistics.items()}
    )
    return vae


def _schedules() -> dict[str, list[float]]:
    """Noise levels: the base model's own for 20 steps, Lightning's for few."""
    scheduler = architecture.scheduler()
    own = Sampler.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
    few = {str(n): sigmas(LIGHTNING_SAMPLER, n, _TARGET_TOKENS) for n in (8, 4, 2)}
    return {"20": sigmas(own, 20, _TARGET_TOKENS), **few}


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
