"""What a model is made from beside its folder: single files, and LoRAs that cannot be merged."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_worker import checkpoints
from image_worker.errors import InvalidSettings
from image_worker.model import ranges, text_checkpoint
from image_worker.model.beside import Beside
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.configs import TransformerConfig
from image_worker.model.opening import in_own_format, open_checkpoint
from image_worker.model.ranges import Ranges
from image_worker.model.sources import Sources
from image_worker.model.wide import Decoding, Wide
from image_worker.settings import Settings

log = logging.getLogger(__name__)

_OF_FEW_STEPS = re.compile(r"lightning|\d[-_ ]?steps?", re.IGNORECASE)


@dataclass(frozen=True)
class Opened:
    """checkpoints: files that components' weights are in instead of the folder's, by the
    components' names; beside: the LoRAs of all jobs, if the transformer's format takes none;
    ranges: of its activations.
    """

    checkpoints: Mapping[str, Checkpoint | Wide]
    beside: Beside | None
    ranges: Ranges


def open_files(found: Sources, settings: Settings, configs: Mapping[str, dict[str, Any]]) -> Opened:
    """configs: of the components, by their names.

    Raises:
        ModelMismatch: a file does not fit the model, or is not understood.
        InvalidSettings: settings contradict what files are.
    """
    transformer = open_transformer(found, settings, configs["transformer"])
    text_encoder = open_text_encoder(found, settings, transformer)
    opened = {"text_encoder": text_encoder, "transformer": transformer}
    return Opened(
        {name: single for name, single in opened.items() if single is not None},
        read_beside(found, transformer, configs["transformer"]),
        ranges.of_file(found.ranges, configs["transformer"]),
    )


def open_transformer(
    found: Sources, settings: Settings, config: dict[str, Any]
) -> Checkpoint | Wide | None:
    """The file that the transformer's weights are in, if they are not the folder's.

    config: the transformer's, of the model's folder.

    Raises:
        ModelMismatch: it does not fit the model, or is not understood.
        InvalidSettings: it is not known whether Lightning is in it; a setting has no meaning with
            it.
    """
    if found.checkpoint is None:
        return None
    expected = TransformerConfig.parse(config)
    opened = open_checkpoint(found.checkpoint, expected)
    own = in_own_format(opened)
    _check_lightning(found.checkpoint, own, settings)
    if settings.checkpoint_decode:
        if own is None:
            raise InvalidSettings(
                f"CHECKPOINT_DECODE=1 has no meaning with {found.checkpoint.name}, which is in "
                f"{opened.label}; drop it"
            )
        opened, own = Decoding.of(own), None
    log.info("transformer: %s, %s", found.checkpoint.name, opened.label)
    if own and found.ranges:
        raise InvalidSettings(
            f"SVDQ_RANGES has no meaning with {found.checkpoint.name}, whose weights stay in "
            f"{own.label}; drop one, or have them decoded with CHECKPOINT_DECODE=1"
        )
    return opened


def _check_lightning(path: Path, own: Checkpoint | None, settings: Settings) -> None:
    """What may have Lightning in it must not get it a second time."""
    source = checkpoints.parse(settings.checkpoint or str(path))
    if settings.checkpoint_lightning != "auto" or checkpoints.published(source):
        return
    name, told = path.name, own.lightning_steps if own else None
    if told:
        raise InvalidSettings(
            f"{name} says that Lightning for {told} steps is merged in it: set "
            f"CHECKPOINT_LIGHTNING={told}, or 0 if it is not so"
        )
    called = settings.checkpoint or name
    if settings.use_lightning_lora and _OF_FEW_STEPS.search(called):
        raise InvalidSettings(
            f"{called} is called so, and does not say whether Lightning is merged in it: set "
            "CHECKPOINT_LIGHTNING=4 or 8 if it is, or 0 to have it added"
        )


def read_beside(
    found: Sources, opened: Checkpoint | Wide | None, config: dict[str, Any]
) -> Beside | None:
    """The LoRAs, if they cannot be merged, since the weights are in a format of their own.

    opened, config: as of `open_transformer`.

    Raises:
        ModelMismatch: one is no LoRA, or does not fit the model.
    """
    if not found.loras or not in_own_format(opened):
        return None
    for path in found.loras:
        log.info("%s is added beside the weights, for every job", path.name)
    return Beside.read(found.loras, TransformerConfig.parse(config))


def open_text_encoder(
    found: Sources, settings: Settings, transformer: Checkpoint | Wide | None
) -> Checkpoint | Wide | None:
    """The file that the text encoder's weights are in, if they are not the folder's.

    transformer: the file that its weights are in, if they are not the folder's.

    Raises:
        ModelMismatch: it does not fit the model, or is not understood.
        InvalidSettings: nothing is left of which a setting says how it is stored.
    """
    if found.text_encoder is None:
        return None
    opened = text_checkpoint.open_text_encoder(found.text_encoder, found.folder / "text_encoder")
    log.info("text encoder: %s, %s", found.text_encoder.name, opened.label)
    own = in_own_format(opened)
    if own and settings.quantize_components == "text":
        raise InvalidSettings(
            f"QUANTIZE_COMPONENTS=text has no meaning with a text encoder in {own.label}, which "
            "serves as it is; drop it, and set PRECISION_MODE=bf16 for a transformer in bf16"
        )
    if own and in_own_format(transformer) and settings.precision_mode != "auto":
        raise InvalidSettings(
            f"PRECISION_MODE={settings.precision_mode} has no meaning where CHECKPOINT and "
            "TEXT_ENCODER_CHECKPOINT both have formats of their own; drop it"
        )
    return opened
