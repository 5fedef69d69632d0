"""Random files as nunchaku's packer writes them, and the weights that they stand for."""

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
from tools.nunchaku import (
    FUSED,
    QUANTISATION,
    filled,
    pack_awq,
    pack_codes,
    pack_factor,
    pack_group_scales,
    pack_vector,
    up_to,
)


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
