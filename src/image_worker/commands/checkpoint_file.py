"""Looks at the file that CHECKPOINT names, as a start would, before anything is downloaded.

Its header is read and not its weights: what only their values show, such as a scale that is no
number, a start alone finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from image_worker import checkpoints
from image_worker.catalog import HubFile, ModelEntry
from image_worker.commands.facts import CheckpointFile
from image_worker.errors import ModelMismatch, WorkerError
from image_worker.model import files, from_url, full_sizes, sources
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.opened import open_transformer
from image_worker.model.opening import ZERO_COND_T, Plain, in_own_format
from image_worker.model.skeleton import Skeleton
from image_worker.model.sources import Sources
from image_worker.model.tensor_file import TensorFile
from image_worker.settings import Settings

_SHOWN = 3  # of the faults that an error names

Opened = Checkpoint | Plain


def look_at_checkpoint(
    settings: Settings, entry: ModelEntry
) -> tuple[CheckpointFile, Opened | None]:
    """What is known of it for the model that would be served; and itself, if a start takes it.

    Raises:
        InvalidSettings: `CHECKPOINT` is not set, or names nothing.
    """
    source = checkpoints.parse(settings.checkpoint or "")
    known = checkpoints.published(source)
    path = from_url.checkpoint_here(settings)
    lightning = checkpoints.lightning_of(settings)
    opened, problem = None, None
    try:
        if path is not None:
            opened = _open(path, settings, entry)
            own = in_own_format(opened)
            lightning = lightning or (own and own.lightning_steps) or 0
        elif settings.local_only:
            problem = "it is not on this machine, and LOCAL_ONLY=1 forbids downloads"
        else:
            sources.loras_of(entry, settings)  # which refuses what contradicts
    except (WorkerError, OSError) as error:
        opened, problem = None, str(error)
    return CheckpointFile(
        name=_name(source),
        size=path.stat().st_size if path else None,
        label=opened.label if opened else None,
        known_for=known.model if known else None,
        lightning=lightning,
        problem=problem,
    ), opened


def _name(source: Path | HubFile | str) -> str:
    """Without what may be secret in a URL."""
    if isinstance(source, HubFile):
        return f"{source.repo}:{source.path}"
    return source.name if isinstance(source, Path) else source.partition("?")[0]


def _open(path: Path, settings: Settings, entry: ModelEntry) -> Opened:
    """By what a start does.

    Raises:
        WorkerError: what it would raise, although it would do so later.
    """
    config = _config(settings, entry)
    loras = tuple(Path(file.path) for file in sources.loras_of(entry, settings))
    found = Sources(full_sizes.FOLDER, loras, checkpoint=path)
    opened = open_transformer(found, settings, config)
    assert opened is not None
    if isinstance(opened, Plain):
        _check_complete(opened, TransformerConfig.parse(config))
    return opened


def _config(settings: Settings, entry: ModelEntry) -> dict[str, Any]:
    """The transformer's, of the model's folder or, where that is not here, as published."""
    try:
        folder = files.model_here(entry, settings)
    except WorkerError:  # said where the model is looked for
        folder = None
    if folder is None:
        return full_sizes.configs_of(entry)["transformer"]
    return files.read_json(folder / "transformer" / "config.json")


def _check_complete(opened: Plain, config: TransformerConfig) -> None:
    """As loading does, tensor by tensor.

    Raises:
        ModelMismatch: tensors are missing, unknown, or of other shapes.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Skeleton(config).named_parameters()}
    parts = TensorFile.open(opened.path).parts
    found = {name: parts[key].shape for name, key in opened.keys.items() if name != ZERO_COND_T}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is not known" for name in found.keys() - expected.keys()]
    wrong += [
        f"{name} is {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if wrong:
        raise ModelMismatch(
            f"the checkpoint {opened.path.name} does not fit the model: {len(wrong)} faults, the "
            f"first: {'; '.join(sorted(wrong)[:_SHOWN])}"
        )
