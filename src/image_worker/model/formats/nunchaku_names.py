"""What is in nunchaku's files: their metadata, and the names and shapes of their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from image_worker.errors import ModelMismatch
from image_worker.model.configs import TransformerConfig
from image_worker.model.formats.fragments import FACTOR_TILE, GROUP, awq_groups, padded
from image_worker.model.tensor_file import TensorFile

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_KEY = "quantization_config"  # of the metadata
_MODEL = "QwenImageTransformer2DModel"
# Layers that the file has as one, their outputs one after the other.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_UNUSED = "smooth_factor_orig"  # which the smoothing was before it was rounded
_SHOWN = 3  # of the faults that an error names
_LARGEST = 2**16  # of a model's widths: more is no model

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Quantisation:
    """What the metadata say. rank: of the low-rank parts, None if they do not say."""

    config: TransformerConfig
    rank: int | None


def is_nunchaku(file: TensorFile) -> bool:
    """Whether a file is of this kind, in int4 or in what this worker does not read."""
    leaves = {name.rpartition(".")[2] for name in file.parts}
    return "qweight" in leaves and (_KEY in file.metadata or "smooth_factor" in leaves)


def quantisation(file: TensorFile) -> Quantisation:
    """Reads the metadata.

    Raises:
        ModelMismatch: it is not SVDQuant in int4, or not of a Qwen-Image model; says what it is.
    """
    _refuse_fp4(file)
    known, config = _json(file, _KEY), _json(file, "config")
    weight, activation = (_part(known, name) for name in ("weight", "activation"))
    facts = {
        "method": (known.get("method"), "svdquant"),
        "weight.dtype": (weight.get("dtype"), "int4"),
        "weight.group_size": (weight.get("group_size"), GROUP),
        "weight.scale_dtype": (weight.get("scale_dtype"), None),
        "activation.dtype": (activation.get("dtype"), "int4"),
        "_class_name": (config.get("_class_name", _MODEL), _MODEL),
        "model_class": (file.metadata.get("model_class", f"Nunchaku{_MODEL}"), f"Nunchaku{_MODEL}"),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise ModelMismatch(
                f"{name} of {file.path.name} is {found!r}; of nunchaku's files this worker reads "
                f"SVDQuant in int4, in which it is {expected!r}"
            )
    rank = known.get("rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ModelMismatch(f"rank of {file.path.name} is {rank!r}, expected a number from 1 on")
    parsed = TransformerConfig.parse(config)
    _check_sizes(file, parsed)
    return Quantisation(parsed, rank)


def _refuse_fp4(file: TensorFile) -> None:
    """Recognised by its scales, which are in FP8, whatever the metadata say."""
    for name, part in file.parts.items():
        if name.endswith(".wscales") and part.dtype == torch.float8_e4m3fn:
            raise ModelMismatch(
                f"{file.path.name} is in nunchaku's fp4, for Blackwell cards ({name} is in FP8), "
                "which this worker does not read; take the file of that name in int4 (svdq-int4)"
            )


def _check_sizes(file: TensorFile, config: TransformerConfig) -> None:
    """So that a model of these can be laid out, which is compared with the file then."""
    sizes = {
        "num_layers": (config.num_layers, len(file.parts)),
        "num_attention_heads": (config.num_attention_heads, _LARGEST),
        "attention_head_dim": (config.attention_head_dim, _LARGEST),
        "joint_attention_dim": (config.joint_attention_dim, _LARGEST),
        "in_channels": (config.in_channels, _LARGEST),
        "the width": (config.width, _LARGEST),
    }
    for name, (found, most) in sizes.items():
        if not 1 <= found <= most:
            raise ModelMismatch(f"{name} of {file.path.name} is {found}, expected 1 to {most}")
    if config.width % GROUP:
        raise ModelMismatch(
            f"the width of {file.path.name} is {config.width}, expected a multiple of {GROUP}"
        )


def _json(file: TensorFile, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.metadata[key])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ModelMismatch(
            f"{file.path.name} has no {key} in its metadata, or none in JSON"
        ) from error
    if not isinstance(found, dict):
        raise ModelMismatch(f"{key} in the metadata of {file.path.name} is {found!r}, no object")
    return found


def _part(known: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = known.get(name)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Names:
    """Of a model's layers and other tensors.

    shapes: of what the model has, under diffusers' names; coded: where a layer of SVDQuant is:
    the file's layer, the number of the part of it, and of how many parts; modulation, plain:
    layers in AWQ, and as they are.
    """

    shapes: Mapping[str, torch.Size]
    coded: Mapping[str, tuple[str, int, int]]
    modulation: frozenset[str]
    plain: frozenset[str]

    coded_leaves = ("qweight", "wscales", "smooth_factor", "bias", "proj_down", "proj_up")
    modulation_leaves = ("qweight", "wscales", "wzeros", "bias")

    @classmethod
    def of(cls, skeleton: nn.Module) -> Names:
        """Of a `Skeleton`."""
        linears = {path for path, part in skeleton.named_modules() if isinstance(part, nn.Linear)}
        blocks = {path for path in linears if path.startswith("transformer_blocks.")}
        modulation = {path for path in blocks if path.endswith("_mod.1")}
        return cls(
            {name: tensor.shape for name, tensor in skeleton.named_parameters()},
            {path: _source(path) for path in sorted(blocks - modulation)},
            frozenset(modulation),
            frozenset(linears - blocks),
        )

    @property
    def linears(self) -> frozenset[str]:
        """Paths of all linear layers."""
        return frozenset(self.coded) | self.modulation | self.plain

    @property
    def others(self) -> frozenset[str]:
        """Names of all tensors that are not theirs."""
        theirs = {f"{path}.{leaf}" for path in self.linears for leaf in ("weight", "bias")}
        return frozenset(self.shapes) - theirs

    def check(self, file: TensorFile, rank: int | None) -> int:
        """The rank that the file has. rank: that it says it has.

        Raises:
            ModelMismatch: tensors are missing, unknown, or of another shape or type; names some.
        """
        found = rank or self._rank(file)
        expected = self._expected(padded(found, FACTOR_TILE))
        known = {f"{source}.{_UNUSED}" for source, _, _ in self.coded.values()}
        wrong = [f"{name} is missing" for name in expected.keys() - file.parts.keys()]
        wrong += [f"{name} is not known" for name in file.parts.keys() - expected.keys() - known]
        for name in expected.keys() & file.parts.keys():
            part, (shapes, types) = file.parts[name], expected[name]
            if tuple(part.shape) not in shapes:
                wrong.append(f"{name} is {tuple(part.shape)}, expected {shapes[0]}")
            elif part.dtype not in types:
                wrong.append(f"{name} is in {part.dtype}, expected {types[0]}")
        wrong += self._mixed(file, expected)
        if wrong:
            raise ModelMismatch(
                f"{file.path.name} does not fit its own configuration (rank {found}): "
                f"{len(wrong)} faults, the first: {'; '.join(sorted(wrong)[:_SHOWN])}"
            )
        return found

    def _rank(self, file: TensorFile) -> int:
        """Of the first layer that says."""
        found = (file.parts.get(f"{source}.proj_up") for source, _, _ in self.coded.values())
        return next((part.shape[-1] for part in found if part and part.shape), FACTOR_TILE)

    def _mixed(self, file: TensorFile, expected: Mapping[str, Any]) -> list[str]:
        """Low-rank factors whose product is of two types."""
        wrong = []
        for name in expected:
            if name.endswith(".proj_up") and name in file.parts:
                other = file.parts.get(f"{name.removesuffix('up')}down")
                if other and other.dtype != file.parts[name].dtype:
                    wrong.append(f"{name} is in {file.parts[name].dtype}, expected {other.dtype}")
        return wrong

    def _expected(self, rank: int) -> dict[str, tuple[Shapes, tuple[torch.dtype, ...]]]:
        """All tensors of such a file: shapes that they may have, and types. rank: padded."""
        found: dict[str, tuple[Shapes, tuple[torch.dtype, ...]]] = {}
        for path, (source, number, count) in self.coded.items():
            if number == 0:
                rows, columns = self.shapes[f"{path}.weight"]
                for leaf, shapes in _coded_shapes(count * rows, columns, rank).items():
                    codes = (torch.int8, torch.uint8)
                    found[f"{source}.{leaf}"] = shapes, codes if leaf == "qweight" else FLOATS
        for path in self.modulation:
            for leaf, shapes in _modulation_shapes(*self.shapes[f"{path}.weight"]).items():
                found[f"{path}.{leaf}"] = shapes, (torch.int32,) if leaf == "qweight" else FLOATS
        names = {f"{path}.{leaf}" for path in self.plain for leaf in ("weight", "bias")}
        for name in names | self.others:
            found[name] = (tuple(self.shapes[name]),), FLOATS
        return found


def _source(path: str) -> tuple[str, int, int]:
    parent, _, name = path.rpartition(".")
    for fused, parts in _FUSED.items():
        if name in parts:
            return f"{parent}.{fused}", parts.index(name), len(parts)
    return path, 0, 1


def _coded_shapes(rows: int, columns: int, rank: int) -> dict[str, Shapes]:
    tall, wide = padded(rows), padded(columns)
    scales: Shapes = ((wide // GROUP, tall),)
    return {
        "qweight": ((tall, wide // 2),),
        # A single group is not padded, and counts as a scale for each row.
        "wscales": ((tall,), (1, tall)) if columns == GROUP else scales,
        "smooth_factor": ((wide,),),
        "bias": ((tall,),),
        "proj_down": ((wide, rank),),
        "proj_up": ((tall, rank),),
    }


def _modulation_shapes(rows: int, columns: int) -> dict[str, Shapes]:
    """Scales with the room that is left free, or without."""
    scales: Shapes = ((awq_groups(columns), rows), (columns // GROUP, rows))
    return {
        "qweight": ((rows // 4, columns // 2),),
        "wscales": scales,
        "wzeros": scales,
        "bias": ((rows,),),
    }
