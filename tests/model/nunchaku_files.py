"""Writes files as nunchaku's packer does: each number is put where a formula says.

The formulas are those of the fragments, lane by lane; what reads such files moves whole axes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from image_worker.model.configs import TransformerConfig
from image_worker.model.skeleton import Skeleton
from tests import upstream

QUANTISATION = {
    "method": "svdquant",
    "weight": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
    "activation": {"dtype": "int4", "scale_dtype": None, "group_size": 64},
}
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def up_to(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def filled(tensor: Tensor, *sizes: int, value: float = 0) -> Tensor:
    """In the first corner of a tensor of these sizes."""
    found = torch.full(sizes, value, dtype=tensor.dtype)
    found[tuple(slice(size) for size in tensor.shape)] = tensor
    return found


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Number of the row, and of the column, of each place."""
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]


def put(tensor: Tensor, at: Tensor) -> Tensor:
    """Each number at its place in a row of them all."""
    found = torch.empty(tensor.numel(), dtype=tensor.dtype)
    found[at.flatten()] = tensor.flatten()
    return found


def pack_codes(codes: Tensor) -> Tensor:
    """int8 (rows, columns / 2), padded, from numbers of -8 to 7, (rows, columns)."""
    codes = filled(codes, up_to(codes.shape[0], 128), up_to(codes.shape[1], 128)).to(torch.uint8)
    n, k = places(*codes.shape)
    tile = (n // 128 * (codes.shape[1] // 64) + k // 64) * 8 + n % 128 // 16
    lane = n % 8 * 4 + k % 32 // 8
    word = (tile * 32 + lane) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    nibbles = put(codes & 15, word * 8 + k % 8).view(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int8).view(len(codes), -1)


def pack_scales(scales: Tensor) -> Tensor:
    """(groups, rows), padded, from (rows, groups)."""
    groups = scales.shape[1]
    scales = filled(scales, up_to(len(scales), 128), groups, value=1)
    n, g = places(*scales.shape)
    lane = n % 128 // 16 * 4 + n % 8 // 2
    at = (n // 128 * groups + g) * 128 + lane * 4 + n % 16 // 8 * 2 + n % 2
    return put(scales, at).view(groups, -1)


def pack_group_scales(scales: Tensor) -> Tensor:
    """As `pack_scales`, with an even number of groups, or of one group a number for each row."""
    rows, groups = scales.shape
    if groups == 1:
        return pack_vector(scales[:, 0], 1)
    return pack_scales(filled(scales, rows, up_to(groups, 2), value=1))


def pack_vector(vector: Tensor, value: float = 0) -> Tensor:
    padded = filled(vector, up_to(len(vector), 128), value=value)
    return pack_scales(padded[:, None])[0]


def pack_factor(factor: Tensor, *, down: bool) -> Tensor:
    """(channels, rank), padded, from (rank, channels) of the one that reads, or from the other."""
    height, width = (128, 16) if not down else (16, 128)
    factor = filled(factor, up_to(factor.shape[0], height), up_to(factor.shape[1], width))
    n, k = places(*factor.shape)
    channel, rank = (k, n) if down else (n, k)
    ranks = factor.shape[0 if down else 1]
    lane = n % 8 * 4 + k % 8 // 2
    tile = channel // 16 * (ranks // 16) + rank // 16
    at = (tile * 32 + lane) * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2
    return put(factor, at).view(-1, ranks)


def pack_awq(codes: Tensor) -> Tensor:
    """int32 (rows / 4, columns / 2) from numbers of 0 to 15, (rows, columns)."""
    n, k = places(*codes.shape)
    word = ((n // 4 * (codes.shape[1] // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    nibbles = put(codes.to(torch.uint8), word * 4 + k % 32 // 8).view(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int32).view(len(codes) // 4, -1)


class Writer:
    """Random layers of a model, packed in `tensors`, and the weights that they stand for, float64,
    in `weights` and `biases`."""

    def __init__(self, config: TransformerConfig, rank: int, dtype: torch.dtype) -> None:
        self.config, self.rank, self.dtype = config, rank, dtype
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        skeleton = Skeleton(config)
        linears = {
            path: tuple(layer.weight.shape)
            for path, layer in skeleton.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        for name, parameter in skeleton.named_parameters():
            if not name.startswith("transformer_blocks.") or ".norm_" in name:
                self.tensors[name] = self._noise(*parameter.shape)
        for number in range(config.num_layers):
            self._block(f"transformer_blocks.{number}.", linears)

    def write(self, path: Path, **metadata: Any) -> Path:
        options = upstream.options(self.config) | {"patch_size": 2}
        known = {
            "config": json.dumps(options | {"_class_name": "QwenImageTransformer2DModel"}),
            "quantization_config": json.dumps(QUANTISATION | {"rank": self.rank}),
            "model_class": "NunchakuQwenImageTransformer2DModel",
        }
        kept = {name: value for name, value in (known | metadata).items() if value is not None}
        save_file(self.tensors, path, kept)
        return path

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def _block(self, prefix: str, linears: dict[str, tuple[int, ...]]) -> None:
        fused = [path for paths in FUSED.values() for path in paths]
        names = [path.removeprefix(prefix) for path in linears if path.startswith(prefix)]
        for name in ("img_mod.1", "txt_mod.1"):
            self._modulation(prefix + name, *linears[prefix + name])
        for source, parts in FUSED.items():
            self._coded(prefix + source, [prefix + part for part in parts], linears)
        for name in names:
            if name not in fused and not name.endswith("_mod.1"):
                self._coded(prefix + name, [prefix + name], linears)

    def _coded(self, source: str, paths: list[str], linears: dict[str, tuple[int, ...]]) -> None:
        height, columns = linears[paths[0]]
        rows = height * len(paths)
        codes = torch.randint(-8, 8, (rows, columns), generator=self._generator)
        scales, smooth = self._noise(rows, columns // 64), self._noise(columns).exp()
        down, up = self._noise(self.rank, columns), self._noise(rows, self.rank)
        bias = self._noise(rows)
        packed = {
            "qweight": pack_codes(codes),
            "wscales": pack_group_scales(scales),
            "smooth_factor": pack_vector(smooth, 1),
            "smooth_factor_orig": pack_vector(smooth, 1),
            "bias": pack_vector(bias),
            "proj_down": pack_factor(down, down=True),
            "proj_up": pack_factor(up, down=False),
        }
        self.tensors |= {f"{source}.{leaf}": tensor for leaf, tensor in packed.items()}
        rest = codes.double() * scales.double().repeat_interleave(64, dim=1) / smooth.double()
        weight = rest + up.double() @ down.double()
        shifted = ".net.2" in source
        whole = bias.double() + 0.171875 * rest.sum(dim=1) * shifted
        self.weights |= dict(zip(paths, weight.split(height), strict=True))
        self.biases |= dict(zip(paths, whole.split(height), strict=True))

    def _modulation(self, path: str, rows: int, columns: int) -> None:
        """Its rows are made as the file has them, six outputs of a channel after each other."""
        codes = torch.randint(16, (rows, columns), generator=self._generator)
        points = torch.randint(16, (rows, columns // 64), generator=self._generator)
        scales, bias = self._noise(rows, columns // 64), self._noise(rows)
        room = up_to(columns // 64, 16)
        packed = {
            "qweight": pack_awq(codes),
            "wscales": filled(scales.t(), room, rows),
            "wzeros": filled((-points * scales.float()).to(self.dtype).t(), room, rows),
            "bias": bias,
        }
        self.tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in packed.items()}
        values = codes.double() - points.repeat_interleave(64, dim=1)
        weight = values * scales.double().repeat_interleave(64, dim=1)
        added = torch.tensor([0, 1, 0, 0, 1, 0]).repeat(rows // 6)
        order = torch.arange(rows).view(-1, 6).t().flatten()
        self.weights[path] = weight[order]
        self.biases[path] = (bias.double() - added)[order]
