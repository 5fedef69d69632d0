"""Looks at the files that CHECKPOINT and TEXT_ENCODER_CHECKPOINT name, as a start would, before
anything is downloaded.

Their headers are read and not their weights: what only the values show, such as a scale that is no
number, a start alone finds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from image_worker import checkpoints
from image_worker.catalog import HubFile, ModelEntry
from image_worker.commands.facts import CheckpointFile
from image_worker.errors import WorkerError
from image_worker.model import files, from_url, full_sizes, in_folder, sources
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.components import TEXT_ENCODER, TRANSFORMER
from image_worker.model.opened import open_text_encoder, open_transformer
from image_worker.model.opening import in_own_format
from image_worker.model.sources import Sources
from image_worker.model.wide import Wide
from image_worker.settings import Settings


def look_at_files(
    settings: Settings, entry: ModelEntry
) -> tuple[dict[str, CheckpointFile], dict[str, Checkpoint | Wide]]:
    """What is known of them for the model that would be served; and those that a start takes. Both
    by the names of the components whose weights they have.

    Raises:
        InvalidSettings: a variable names nothing.
    """
    known: dict[str, CheckpointFile] = {}
    opened: dict[str, Checkpoint | Wide] = {}
    if settings.checkpoint is not None:
        known[TRANSFORMER.name], transformer = _look_at_transformer(settings, entry)
        if transformer is not None:
            opened[TRANSFORMER.name] = transformer
    if settings.text_encoder_checkpoint is not None:
        beside = opened.get(TRANSFORMER.name)
        known[TEXT_ENCODER.name], encoder = _look_at_text_encoder(settings, entry, beside)
        if encoder is not None:
            opened[TEXT_ENCODER.name] = encoder
    return known, opened


def _look_at_transformer(
    settings: Settings, entry: ModelEntry
) -> tuple[CheckpointFile, Checkpoint | Wide | None]:
    source = checkpoints.parse(settings.checkpoint or "")
    published = checkpoints.published(source)
    path = from_url.checkpoint_here(settings)
    opened, problem = _look(path, settings, lambda: _open_transformer(path, settings, entry))
    own = in_own_format(opened)
    lightning = checkpoints.lightning_of(settings) or (own and own.lightning_steps) or 0
    return CheckpointFile(
        name=_name(source),
        size=path.stat().st_size if path else None,
        label=opened.label if opened else None,
        known_for=published.model if published else None,
        lightning=lightning,
        problem=problem,
    ), opened


def _look_at_text_encoder(
    settings: Settings, entry: ModelEntry, transformer: Checkpoint | Wide | None
) -> tuple[CheckpointFile, Checkpoint | Wide | None]:
    text = settings.text_encoder_checkpoint or ""
    path = from_url.text_encoder_here(settings)
    opened, problem = _look(
        path, settings, lambda: _open_text_encoder(path, settings, entry, transformer)
    )
    return CheckpointFile(
        name=_name(checkpoints.parse(text, "TEXT_ENCODER_CHECKPOINT")),
        size=path.stat().st_size if path else None,
        label=opened.label if opened else None,
        problem=problem,
    ), opened


def _look(
    path: Path | None, settings: Settings, open_file: Callable[[], Checkpoint | Wide | None]
) -> tuple[Checkpoint | Wide | None, str | None]:
    """What `open_file` opens, and why a start would end. path: None if it is not here."""
    if path is None and settings.local_only:
        return None, "it is not on this machine, and LOCAL_ONLY=1 forbids downloads"
    try:
        return open_file(), None
    except (WorkerError, OSError) as error:
        return None, str(error)


def _name(source: Path | HubFile | str) -> str:
    """Without what may be secret in a URL."""
    if isinstance(source, HubFile):
        return f"{source.repo}:{source.path}"
    return source.name if isinstance(source, Path) else source.partition("?")[0]


def _open_transformer(
    path: Path | None, settings: Settings, entry: ModelEntry
) -> Checkpoint | Wide | None:
    """By what a start does. Without a path, settings alone are judged.

    Raises:
        WorkerError: what it would raise, although it would do so later.
    """
    folder = _folder(settings, entry)
    if folder is None:
        config = full_sizes.configs_of(entry)[TRANSFORMER.name]
    else:
        config = in_folder.read_json(folder / TRANSFORMER.name / "config.json")
    loras = tuple(Path(file.path) for file in sources.loras_of(entry, settings))
    place = folder or full_sizes.FOLDER
    opened = open_transformer(Sources(place, loras, checkpoint=path), settings, config)
    if isinstance(opened, Wide):
        opened.check(TRANSFORMER.empty(place / TRANSFORMER.name))
    return opened


def _open_text_encoder(
    path: Path | None,
    settings: Settings,
    entry: ModelEntry,
    transformer: Checkpoint | Wide | None,
) -> Checkpoint | Wide | None:
    """The same. transformer: as of `open_text_encoder`."""
    place = _folder(settings, entry) or full_sizes.FOLDER
    opened = open_text_encoder(Sources(place, (), text_encoder=path), settings, transformer)
    if isinstance(opened, Wide):
        opened.check(TEXT_ENCODER.empty(place / TEXT_ENCODER.name))
    return opened


def _folder(settings: Settings, entry: ModelEntry) -> Path | None:
    """The model's, if it is here. If not, configurations are as published."""
    try:
        return files.model_here(entry, settings)
    except WorkerError:  # said where the model is looked for
        return None
