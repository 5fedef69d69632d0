"""Activation ranges: how large the inputs of the transformer's quantised layers are, by channel.

svdq fits weights to them (`formats/decomposition.py`). They are recorded while a few jobs run, by
the transformer that serves or by diffusers' module, and kept in a safetensors file: for each layer,
under diffusers' name, the root mean square of each channel, (in_features) float32. Layers that read
the same input have the same numbers.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from image_worker.errors import BrokenPicture, ModelMismatch, ModelUnavailable
from image_worker.model import prepared
from image_worker.model.adapters import PRODUCTS
from image_worker.model.components import TRANSFORMER
from image_worker.model.configs import TransformerConfig
from image_worker.model.skeleton import Skeleton
from image_worker.model.tensor_file import TensorFile
from image_worker.model.transformer import Transformer

KIND = "activation ranges: root mean squares of inputs"  # in the file's metadata, as "kind"


@dataclass(frozen=True)
class Ranges:
    """A file's. layers: by their names; digest: of the file, None where there is none."""

    layers: Mapping[str, Tensor]
    digest: str | None


NO_RANGES = Ranges({}, None)


class Recorder:
    """Sums of squares of inputs, channel by channel, over all forwards."""

    def __init__(self) -> None:
        self.forwards = 0
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, names: Iterable[str], x: Tensor) -> None:
        """These layers read x (..., in). Takes no memory of x's size."""
        channels = x.shape[-1]
        tokens = x.numel() // channels
        if not tokens:
            return
        lengths = torch.linalg.vector_norm(x.reshape(-1, channels), dim=0, dtype=torch.float32)
        squares = lengths.double().square()
        for name in names:
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares
            self._tokens[name] = self._tokens.get(name, 0) + tokens

    def ranges(self) -> dict[str, Tensor]:
        """Of each layer that read anything, the root mean square of each channel, on the host."""
        return {
            name: (total / self._tokens[name]).sqrt().float().cpu()
            for name, total in self._sums.items()
        }


@contextmanager
def watch(module: nn.Module, names: Iterable[str]) -> Iterator[Recorder]:
    """Meanwhile, what linear layers of these names read is recorded: of diffusers' module."""

    def reads(recorder: Recorder, name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        recorder.add([name], given[0])

    recorder = Recorder()
    with ExitStack() as hooks:
        _count_forwards(module, recorder, hooks)
        for name in names:
            hook = functools.partial(reads, recorder, name)
            hooks.callback(module.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield recorder


@contextmanager
def watch_served(transformer: Transformer) -> Iterator[Recorder]:
    """The same of all quantised layers of the transformer that serves.

    Its last block computes targets only, so of that one's text layers nothing but those of the
    attention's first product are ever used.

    Raises:
        ValueError: activations are rounded for products, and would be recorded so.
    """

    def read(
        recorder: Recorder,
        image: list[str],
        text: list[str],
        _: nn.Module,
        given: tuple[Tensor, int],
    ) -> None:
        x, text_tokens = given
        recorder.add(text, x[:text_tokens])
        recorder.add(image, x[text_tokens:])

    recorder = Recorder()
    with ExitStack() as hooks:
        _count_forwards(transformer, recorder, hooks)
        for number, block in enumerate(transformer.blocks):
            for product, layers in PRODUCTS.items():
                served: Any = getattr(block, product)
                if served.round_to is not None:
                    raise ValueError("ranges are recorded with COMPUTE=bf16 only")
                image, text = (
                    [f"transformer_blocks.{number}.{one}" for one in some] for some in layers
                )
                hook = functools.partial(read, recorder, image, text)
                hooks.callback(served.register_forward_pre_hook(hook).remove)
        yield recorder


def _count_forwards(module: nn.Module, recorder: Recorder, hooks: ExitStack) -> None:
    def count(*_: object) -> None:
        recorder.forwards += 1

    hooks.callback(module.register_forward_pre_hook(count).remove)


def layers_of(config: TransformerConfig) -> dict[str, int]:
    """The quantised layers of a transformer, and how many channels each reads."""
    with torch.device("meta"):
        skeleton = Skeleton(config)
    return {
        name: layer.in_features
        for name, layer in skeleton.named_modules()
        if isinstance(layer, nn.Linear) and TRANSFORMER.quantised(name)
    }


def write(path: Path, recorder: Recorder, config: TransformerConfig) -> int:
    """Writes a file, whole or not at all. Returns how many layers read nothing: they have zeros.

    Raises:
        BrokenPicture: what was recorded has NaN or infinity.
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    found = recorder.ranges()
    for name, values in found.items():
        if not torch.isfinite(values).all():
            raise BrokenPicture(f"inputs of {name} had NaN or infinity; see BNB_COMPUTE")
    expected = layers_of(config)
    tensors = {name: found.get(name, torch.zeros(width)) for name, width in expected.items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(save(tensors, {"kind": KIND, "forwards": str(recorder.forwards)}))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(set(expected) - set(found))


def of_file(path: Path | None, config: Mapping[str, Any]) -> Ranges:
    """What a file has for the transformer of that configuration; None: there is no file.

    Raises:
        ModelMismatch: it is damaged, or of another model; says what was found.
        ModelUnavailable: it cannot be read.
    """
    if path is None:
        return NO_RANGES
    try:
        return _read(TensorFile.open(path), layers_of(TransformerConfig.parse(dict(config))))
    except OSError as error:
        raise ModelUnavailable(f"{path.name} cannot be read: {error.strerror}") from error


def _read(file: TensorFile, expected: Mapping[str, int]) -> Ranges:
    """All of it is checked before anything is read."""
    called, kind = file.path.name, file.metadata.get("kind")
    if kind != KIND:
        found = f"its metadata's kind is {kind!r}" if kind else "its metadata names no kind"
        raise ModelMismatch(f"{called} is no file of activation ranges: {found}")
    unknown, missing = set(file.parts) - set(expected), set(expected) - set(file.parts)
    if unknown:
        raise ModelMismatch(
            f"{called} has ranges of {len(unknown)} layers that the model does not quantise, the "
            f"first: {min(unknown)}"
        )
    if missing:
        raise ModelMismatch(
            f"{called} lacks {len(missing)} of the model's {len(expected)} quantised layers, the "
            f"first: {min(missing)}"
        )
    for name, width in expected.items():
        part = file.parts[name]
        if part.dtype != torch.float32 or part.shape != (width,):
            kept = str(part.dtype).removeprefix("torch.")
            raise ModelMismatch(
                f"{called} has {name} as {kept} {tuple(part.shape)}; expected float32 ({width},)"
            )
    layers = {name: file.read(name) for name in expected}
    for name, values in layers.items():
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ModelMismatch(
                f"{called} has values for {name} that are no sizes: below 0, infinite or NaN"
            )
    return Ranges(layers, prepared.digest(file.path.read_bytes()))
