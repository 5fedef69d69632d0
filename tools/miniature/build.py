"""Builds the miniature model folder from a fixed seed: `python -m tools.miniature.build FOLDER`.

The weights are random (scaled so that every layer carries signal), so its pictures are patterns,
not edits; everything else about it is what the full models have: the classes, the folder layout,
the key format of the Lightning LoRA files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLImageProcessorPil

from tools.miniature import architecture, tokenizer

SEED = 20_261_120
LORA_RANK, LORA_ALPHA = 8, 8.0
LORA_MODULES = (
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


def main() -> None:
    """Writes every component, then both Lightning LoRA files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(SEED)
    words = tokenizer.build()
    words.save_pretrained(folder / "tokenizer")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    architecture.scheduler().save_pretrained(folder / "scheduler")
    transformer = architecture.transformer()
    _spread(transformer.named_parameters())
    for name, model in {
        "transformer": transformer,
        "vae": architecture.vae(),
        "text_encoder": architecture.text_encoder(words),
    }.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    for steps in (4, 8):
        _write_lora(transformer, folder / "loras", steps)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def _spread(parameters) -> None:  # type: ignore[no-untyped-def]
    """Initial weights of diffusers' modules are small; at depth 7 the signal should still vary."""
    for name, parameter in parameters:
        if parameter.ndim == 2:
            gain = 0.5 if "_mod." in name or "norm_out" in name else 1.0
            nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)


def _write_lora(transformer: nn.Module, folder: Path, steps: int) -> None:
    """A random LoRA in the format of lightx2v's files: `lora_down`, `lora_up` and `alpha`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for index in range(len(transformer.transformer_blocks)):  # type: ignore[arg-type]
        for module in LORA_MODULES:
            name = f"transformer_blocks.{index}.{module}"
            rows, columns = transformer.get_submodule(name).weight.shape
            down = torch.randn(LORA_RANK, columns) * columns**-0.5
            up = torch.randn(rows, LORA_RANK) * 0.1 * LORA_RANK**-0.5
            tensors[f"{name}.lora_down.weight"] = down.to(torch.bfloat16)
            tensors[f"{name}.lora_up.weight"] = up.to(torch.bfloat16)
            tensors[f"{name}.alpha"] = torch.tensor(LORA_ALPHA, dtype=torch.bfloat16)
    save_file(tensors, folder / f"miniature-lightning-{steps}steps-V1.0-bf16.safetensors")


if __name__ == "__main__":
    main()
