"""A checkpoint of the true architecture and size with random weights, and a Lightning LoRA for it.

Speed, memory and loading are those of the real files; pictures are noise. It is written into a
Hugging Face cache, where the worker finds it as it would find the real one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from image_worker.catalog import CATALOG, HubFile, ModelEntry

SHARD_BYTES = 5 * 10**9  # as the published checkpoints are cut
LORA_RANK, LORA_ALPHA = 64, 8.0  # as the published Lightning files have it
_MINIATURE = Path(CATALOG["mini"].repo)


def write_checkpoint(cache: Path, entry: ModelEntry) -> Path:
    """Writes the model (57 GB) and both Lightning files of `entry` into `cache`."""
    folder = snapshot(cache, entry.repo, entry.revision)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(_MINIATURE / name, folder / name, dirs_exist_ok=True)
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel()
        models = {
            "transformer": transformer,
            "vae": AutoencoderKLQwenImage(),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(text_config()),
        }
    for name, model in models.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write_config(folder / name, model)
        _write_shards(folder / name, model)
    for file in entry.lightning.values():
        _write_lora(snapshot(cache, file.repo, file.revision), file, transformer)
    return folder


def snapshot(cache: Path, repo: str, revision: str) -> Path:
    """Where a Hugging Face cache keeps a repo's commit."""
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    if len(revision) != 40:  # a branch: the cache maps its name to a commit
        refs = folder.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(revision)
    return folder


def text_config() -> Any:
    """Qwen2.5-VL-7B, with the miniature's token numbers, since its tokenizer is used."""
    ids = json.loads((_MINIATURE / "text_encoder" / "config.json").read_text())
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128_000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [16, 24, 24],
            },
            "bos_token_id": None,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
        **{name: number for name, number in ids.items() if name.endswith("_token_id")},
    )


def _write_config(folder: Path, model: Any) -> None:
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def _write_shards(folder: Path, model: nn.Module) -> None:
    stem = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    count = 0

    def flush() -> None:
        nonlocal count, shard
        count += 1
        file = f"{stem}-{count:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard = {}

    for name, tensor in _random_weights(model, folder.name):
        if sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _random_weights(model: nn.Module, label: str) -> Iterator[tuple[str, Tensor]]:
    """bf16 weights that keep activations of order one: normal matrices, unit gains, no biases."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, parameter in tqdm(list(model.named_parameters()), desc=label, disable=None):
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim > 1 and "gamma" not in name:
            nn.init.normal_(values, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(values, 0.0 if name.endswith("bias") else 1.0)
        yield name, values.cpu()


def _write_lora(folder: Path, file: HubFile, transformer: nn.Module) -> None:
    tensors = {}
    for name, module in transformer.named_modules():
        layer = isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")
        if not layer or "_mod." in name:
            continue
        down = torch.randn(LORA_RANK, module.in_features) * module.in_features**-0.5
        up = torch.randn(module.out_features, LORA_RANK) * 0.01
        tensors[f"{name}.lora_down.weight"] = down.to(torch.bfloat16)
        tensors[f"{name}.lora_up.weight"] = up.to(torch.bfloat16)
        tensors[f"{name}.alpha"] = torch.tensor(LORA_ALPHA, dtype=torch.bfloat16)
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
