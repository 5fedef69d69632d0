"""nunchaku's files: attention and MLPs in SVDQuant int4, modulation in AWQ int4, the rest in bf16.

Their int4 parts are made for activations in int4, too. Here only the weights that they stand for
count: activations are rounded as for every other format, if at all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from image_worker.errors import ModelMismatch
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats import fragments
from image_worker.model.formats.coded import CodedLinear
from image_worker.model.formats.nunchaku_names import FLOATS, Names, quantisation
from image_worker.model.formats.svdq import SvdqWeight
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile

# What is added to GELU's result before it is rounded to int4, so that it is never negative: -0.17
# is the least that GELU gives. The int4 part of the layer behind it sees the sum; its low-rank part
# does not.
SHIFT = 0.171875
_SHIFTED = re.compile(r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.2")
_OUTPUTS = 6  # of a modulation layer, one after the other for each channel
_SCALES = (1, 4)  # which of these are scales: 1 is added to their biases
_ROUNDING = 2.0**-8  # of a bf16 number, relative


class NunchakuCheckpoint:
    """A `Checkpoint` of such a file."""

    lightning_steps: int | None = None  # no metadata say so

    def __init__(self, file: TensorFile, expected: TransformerConfig | None = None) -> None:
        """Reads the header only. expected: of the model that it is to serve.

        Raises:
            ModelMismatch: it has other weights than SVDQuant's in int4, or those of another model,
                or tensors that are missing, unknown or of another shape.
        """
        found = quantisation(file)
        # Whether references count as clean is the model's to say: files of 2511 may lack the word.
        if expected and replace(found.config, zero_cond_t=expected.zero_cond_t) != expected:
            raise ModelMismatch(
                f"{file.path.name} belongs to another model: its configuration is {found.config}, "
                f"expected {expected}"
            )
        self.config = expected or found.config
        self.path = file.path
        with torch.device("meta"):
            skeleton = Skeleton(found.config)
        self._names = Names.of(skeleton)
        rank = self._names.check(file, found.rank)
        self._file = file
        self._shapes = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
        self.label = f"SVDQuant int4, rank {rank}"
        self.linears = self._names.linears
        self.others = self._names.others
        # Queries, keys and values are read one after the other, from the same tensors.
        self._read_whole = functools.lru_cache(maxsize=1)(self._read_layer)

    def linear(self, path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """As of `Checkpoint`."""
        rows, columns = self._shapes[f"{path}.weight"]
        found: nn.Module
        if path in self._names.coded:
            weight, bias = self._coded(path, device)
            found = CodedLinear(weight)
        else:
            found = nn.Linear(columns, rows, device="meta", dtype=dtype)
            if device.type == "meta":
                return found.requires_grad_(False)
            numbers, bias = self.full(path, device)
            found.weight = nn.Parameter(numbers.to(device, dtype), requires_grad=False)
        found.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        return found

    def full(self, path: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """As of `Checkpoint`."""
        if path in self._names.modulation:
            parts = self._read_layer(path, self._names.modulation_leaves)
            return _modulation({leaf: part.to(device) for leaf, part in parts.items()})
        if path not in self._names.coded:
            return self.other(f"{path}.weight").to(device), self.other(f"{path}.bias").to(device)
        coded, bias = self._coded(path, device)
        weight = torch.empty(coded.shape, device=device)
        coded.decode(weight)
        return weight, bias

    def other(self, name: str) -> Tensor:
        """As of `Checkpoint`, and what is stored under its own name."""
        try:
            found = self._file.read(name)
        except OSError as error:
            raise ModelMismatch(
                f"{name} of {self._file.path.name} cannot be read: {error}"
            ) from error
        if found.dtype in FLOATS and not torch.isfinite(found).all():
            raise ModelMismatch(f"{name} of {self._file.path.name} has numbers that are not finite")
        return found

    def stored_bytes(self, path: str) -> int:
        """As of `Checkpoint`: weights that are not coded, and biases, in bf16."""
        layer = self.linear(path, torch.device("meta"), torch.bfloat16)
        return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))

    def _coded(self, path: str, device: torch.device) -> tuple[SvdqWeight, Tensor]:
        """The weight on a device, and the bias, (rows) float32."""
        rows, columns = self._shapes[f"{path}.weight"]
        source, number, count = self._names.coded[path]
        if device.type == "meta":
            return self._empty(source, rows, columns)
        parts = self._read_whole(source, self._names.coded_leaves)
        # The whole of queries, keys and values is put in order: where these end within it, tiles
        # may not.
        codes, scales, up, bias = (
            tensor[number * rows : (number + 1) * rows].clone()
            for tensor in _plain_rows(parts, count * rows, columns, device)
        )
        inverse = 1 / fragments.vector(parts["smooth_factor"].to(device), columns).float()
        if not torch.isfinite(inverse).all():
            raise ModelMismatch(f"{source}.smooth_factor of {self._file.path.name} has zeros")
        down = fragments.down(parts["proj_down"].to(device), columns)
        weight = SvdqWeight(codes, scales, inverse[None], down[None], up)
        bias = bias.float()
        return weight, bias + SHIFT * _sums_of_rest(weight) if _SHIFTED.fullmatch(path) else bias

    def _empty(self, source: str, rows: int, columns: int) -> tuple[SvdqWeight, Tensor]:
        parts = self._file.parts
        rank = parts[f"{source}.proj_up"].shape[1]

        def empty(leaf: str, *shape: int) -> Tensor:
            dtype = torch.uint8 if leaf == "qweight" else parts[f"{source}.{leaf}"].dtype
            return torch.empty(shape, dtype=dtype, device="meta")

        weight = SvdqWeight(
            empty("qweight", rows, columns // 2),
            empty("wscales", rows, columns // fragments.GROUP),
            torch.empty(1, columns, dtype=torch.float32, device="meta"),
            empty("proj_down", 1, rank, columns),
            empty("proj_up", rows, rank),
        )
        return weight, torch.empty(rows, dtype=torch.float32, device="meta")

    def _read_layer(self, path: str, leaves: tuple[str, ...]) -> dict[str, Tensor]:
        """A layer's tensors as the file has them."""
        return {leaf: self.other(f"{path}.{leaf}") for leaf in leaves}


def _plain_rows(
    parts: Mapping[str, Tensor], rows: int, columns: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Codes, scales, the low-rank factor of the outputs, and the bias, all by rows."""
    return (
        fragments.codes(parts["qweight"].to(device), rows, columns),
        fragments.scales(parts["wscales"].to(device), rows, columns),
        fragments.up(parts["proj_up"].to(device), rows),
        fragments.vector(parts["bias"].to(device), rows),
    )


def _sums_of_rest(weight: SvdqWeight) -> Tensor:
    """Each row's sum of what is in int4, (rows) float32."""
    no_rank = weight.down[:, :0], weight.up[:, :0]
    rest = SvdqWeight(weight.codes, weight.scales, weight.inverse, *no_rank)
    return torch.cat([piece.sum(dim=1, dtype=torch.float64) for _, piece in rest.pieces()]).float()


def _modulation(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out) of a modulation layer, float32, in diffusers' order."""
    codes = _in_order(fragments.awq_codes(parts["qweight"]))
    columns = codes.shape[1]
    groups = columns // fragments.GROUP
    scales, zeros = (_in_order(parts[leaf][:groups].t().float()) for leaf in ("wscales", "wzeros"))
    weight = codes.float().view(-1, groups, fragments.GROUP)
    weight = weight.mul_(scales[:, :, None]).add_(_exact(zeros, scales)[:, :, None])
    bias = _in_order(parts["bias"].float())
    bias = bias.view(_OUTPUTS, -1)
    bias[list(_SCALES)] -= 1
    return weight.view(-1, columns), bias.flatten()


def _in_order(rows: Tensor) -> Tensor:
    """Outputs one after the other, each with all of its channels."""
    return rows.view(-1, _OUTPUTS, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _exact(zeros: Tensor, scales: Tensor) -> Tensor:
    """Offsets of groups. What is a whole number of scales but for its rounding, is one."""
    steps = torch.where(scales == 0, 0, zeros / scales)
    whole = steps.round()
    is_whole = (steps - whole).abs() <= _ROUNDING * whole.abs()
    return torch.where(is_whole & (scales != 0), whole * scales, zeros)
