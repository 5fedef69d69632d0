"""A model's transformer in files of other programs: `python -m tools.full_size_files FOLDER INTO`.

FOLDER holds a diffusers transformer: that of `bench.checkpoint`'s random model, or of a real one.
Layers are coded on a card, if there is one, where the full size takes a minute a file. All of the
blocks' matrices are coded, those of modulation too, as in the published files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from image_worker.bench import ggml as on_card
from image_worker.model.components import is_modulation
from image_worker.model.formats.decomposition import GROUP, decompose
from image_worker.model.formats.nunchaku import SHIFT
from tools import ggml, nunchaku

PREFIX = "model.diffusion_model."  # of ComfyUI's files
RANK = 32
_OUTPUTS = 6  # of a modulation layer
_FP8 = torch.float8_e4m3fn


class Weights:
    """The tensors of a folder of safetensors files, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self._shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found.to(self._device)

    def names(self, title: str) -> Iterator[str]:
        """All of them, with a progress bar."""
        yield from tqdm(sorted(self._files), desc=title, disable=None)

    def is_coded(self, name: str) -> bool:
        """Whether it is a matrix of a block."""
        return name.startswith("transformer_blocks.") and len(self._shapes[name]) == 2


def main() -> None:
    """Writes a file of each kind that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a transformer, as diffusers has it")
    parser.add_argument("into", type=Path, help="where the files go")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    weights = Weights(options.folder)
    for kind in options.kinds:
        start = time.perf_counter()
        file = write(weights, options.into, kind)
        gib, seconds = file.stat().st_size / 2**30, time.perf_counter() - start
        sys.stdout.write(f"{file}: {gib:.2f} GiB in {seconds:.0f} s\n")


def write(weights: Weights, into: Path, kind: str) -> Path:
    """One file."""
    file = into / f"{kind}.{'gguf' if KINDS[kind] is _gguf else 'safetensors'}"
    KINDS[kind](weights, file)
    return file


def _fp8(weights: Weights, file: Path) -> None:
    """A scale for each weight, under ComfyUI's names."""
    found = {f"{PREFIX}scaled_fp8": torch.zeros(2, dtype=_FP8)}
    for name in weights.names(file.name):
        tensor = weights[name]
        found[PREFIX + name] = tensor.cpu()
        if weights.is_coded(name):
            scale = tensor.float().abs().amax() / torch.finfo(_FP8).max
            found[PREFIX + name] = (tensor.float() / scale).to(_FP8).cpu()
            found[PREFIX + name.removesuffix("weight") + "scale_weight"] = scale.cpu()
    save_file(found, file)


def _gguf(weights: Weights, file: Path) -> None:
    """Types by llama.cpp's rule, but for its search of scales."""
    blocks = weights.config["num_layers"]
    found: dict[str, tuple[ggml.Array, str]] = {}
    for name in weights.names(file.name):
        tensor = weights[name]
        if weights.is_coded(name):
            kind = on_card.type_of(file.stem, name.removesuffix(".weight"), blocks)
            coded = on_card.encode(tensor, kind).weight.data
            found[name] = (coded.cpu().numpy(), kind)
        elif tensor.ndim == 1:
            found[name] = (tensor.float().cpu().numpy(), "F32")
        else:
            found[name] = (tensor.bfloat16().view(torch.uint8).cpu().numpy(), "BF16")
    ggml.write(file, found)


def _nunchaku(weights: Weights, file: Path) -> None:
    """SVDQuant int4 of rank 32 with AWQ modulation, without activation ranges: nothing smoothed."""
    found: dict[str, Tensor] = {}
    parts = {part: source for source, fused in nunchaku.FUSED.items() for part in fused}
    for name in weights.names(file.name):
        path, _, leaf = name.rpartition(".")
        block, layer = path.split(".", 2)[:2], path.split(".", 2)[-1]
        prefix = ".".join([*block, ""])
        if not name.startswith("transformer_blocks.") or ".norm_" in name:
            found[name] = weights[name].bfloat16().cpu()
        elif leaf == "weight" and is_modulation(path):
            found |= _awq(path, weights)
        elif leaf == "weight" and layer in parts:
            source = parts[layer]
            if layer == nunchaku.FUSED[source][0]:
                paths = [prefix + part for part in nunchaku.FUSED[source]]
                found |= _svdq(prefix + source, paths, weights)
        elif leaf == "weight":
            found |= _svdq(path, [path], weights)
    metadata = {
        "config": json.dumps(weights.config),
        "quantization_config": json.dumps(nunchaku.QUANTISATION | {"rank": RANK}),
        "model_class": "NunchakuQwenImageTransformer2DModel",
    }
    save_file(found, file, metadata)


def _svdq(source: str, paths: list[str], weights: Weights) -> dict[str, Tensor]:
    """What the file calls `source`: one layer, or several one below the other."""
    weight = torch.cat([weights[f"{path}.weight"] for path in paths])
    bias = torch.cat([weights[f"{path}.bias"] for path in paths]).float()
    found = decompose(weight, RANK)
    pairs = torch.stack([found.codes & 15, found.codes >> 4], dim=2).flatten(1).to(torch.int8)
    codes = (pairs ^ 8) - 8
    if ".net.2" in source:  # what reads its input shifts it
        coded = codes * found.scales.float().repeat_interleave(GROUP, dim=1) * found.inverse
        bias = bias - SHIFT * coded.sum(dim=1)
    smooth = nunchaku.pack_vector((1 / found.inverse).bfloat16(), 1)
    packed = {
        "qweight": nunchaku.pack_codes(codes),
        "wscales": nunchaku.pack_group_scales(found.scales),
        "smooth_factor": smooth,
        "smooth_factor_orig": smooth,
        "bias": nunchaku.pack_vector(bias.bfloat16()),
        "proj_down": nunchaku.pack_factor(found.down, down=True),
        "proj_up": nunchaku.pack_factor(found.up, down=False),
    }
    return {f"{source}.{leaf}": tensor.cpu().clone() for leaf, tensor in packed.items()}


def _awq(path: str, weights: Weights) -> dict[str, Tensor]:
    """A modulation layer: six outputs of a channel after each other, and 1 taken off its scales."""
    rows = len(weights[f"{path}.bias"])
    order = torch.arange(rows).view(_OUTPUTS, -1).t().flatten()
    weight = weights[f"{path}.weight"].float()[order]
    added = torch.tensor([0, 1, 0, 0, 1, 0]).repeat(rows // _OUTPUTS)
    bias = weights[f"{path}.bias"].float()[order] + added.to(weight.device)
    groups = weight.view(rows, -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).bfloat16()
    safe = torch.where(scales == 0, 1, scales).float()
    points = (-low / safe).round().clamp(0, 15)
    codes = ((groups / safe[:, :, None]).round() + points[:, :, None]).clamp(0, 15).view_as(weight)
    room = nunchaku.up_to(groups.shape[1], 16)
    zeros = (-points * scales.float()).bfloat16()
    packed = {
        "qweight": nunchaku.pack_awq(codes),
        "wscales": nunchaku.filled(scales.t(), room, rows),
        "wzeros": nunchaku.filled(zeros.t(), room, rows),
        "bias": bias.bfloat16(),
    }
    return {f"{path}.{leaf}": tensor.cpu() for leaf, tensor in packed.items()}


KINDS: dict[str, Callable[[Weights, Path], None]] = {
    "fp8": _fp8,
    "Q8_0": _gguf,
    "Q4_K_M": _gguf,
    "nunchaku": _nunchaku,
}

if __name__ == "__main__":
    main()
