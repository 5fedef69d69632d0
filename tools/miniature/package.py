"""Makes the served model folder of a training run: `python -m tools.miniature.package RUN FOLDER`.

Needs no GPU. The folder has diffusers' layout, and three LoRAs: Lightning for 4 and 8 steps, and
the outlined style.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.miniature import architecture, tokenizer

LORAS = {
    "lightning-4": "miniature-lightning-4steps-V1.0-bf16",
    "lightning-8": "miniature-lightning-8steps-V1.0-bf16",
    "style": "miniature-outlined-style-bf16",
}


def main() -> None:
    """Writes every component."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    run, folder = options.run, options.folder
    words = tokenizer.build()
    words.save_pretrained(folder / "tokenizer")
    architecture.image_processor().save_pretrained(folder / "processor")
    architecture.scheduler().save_pretrained(folder / "scheduler")
    text = architecture.text_encoder(words)
    text.model.load_state_dict(load_file(run / "text.safetensors"))
    transformer = architecture.transformer()
    transformer.load_state_dict(load_file(run / "transformer.safetensors"))
    for name, model in {
        "text_encoder": text,
        "transformer": transformer,
        "vae": whole_vae(run),
    }.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    (folder / "loras").mkdir(exist_ok=True)
    for source, target in LORAS.items():
        shutil.copy(run / f"{source}.safetensors", folder / "loras" / f"{target}.safetensors")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def whole_vae(run: Path) -> Any:
    """The full autoencoder with the folded one's weights; slices for other frames are zeros."""
    statistics = {
        name: [round(value, 4) for value in values.tolist()]
        for name, values in load_file(run / "statistics.safetensors").items()
    }
    full = architecture.vae()
    full.register_to_config(**statistics)
    folded, state = load_file(run / "vae.safetensors"), {}
    for name, tensor in full.state_dict().items():
        state[name] = _unfold(folded[name], tensor)
    full.load_state_dict(state)
    return full


def _unfold(folded: Tensor, like: Tensor) -> Tensor:
    if folded.shape == like.shape:
        return folded
    kernel = torch.zeros_like(like)
    kernel[:, :, -1] = folded  # the last time slice is the one that meets the picture
    return kernel


if __name__ == "__main__":
    main()
