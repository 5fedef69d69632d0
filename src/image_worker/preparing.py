"""Prepares weights for later starts, and can remove what these do not need any more."""

from __future__ import annotations

from dataclasses import dataclass

from image_worker.catalog import choose
from image_worker.checkpoints import model_of
from image_worker.model import dropping
from image_worker.model.hardware import detect_hardware
from image_worker.settings import Settings
from image_worker.worker import Worker


@dataclass(frozen=True)
class Outcome:
    """Whether prepared weights are there, and how many bytes of the checkpoint were removed."""

    prepared: bool
    freed: int = 0


def prepare(settings: Settings, *, drop: bool = False) -> Outcome:
    """A start, up to its first edit. drop: the checkpoint goes, if all that stands for it is right.

    Raises:
        OperatorError: the settings cannot be honoured on this machine.
        CardLost: prepared weights are damaged, and were taken away.
    """
    entry = choose(model_of(settings), has_card=detect_hardware(settings).free is not None)
    if drop:
        dropping.check(entry, settings)
    worker = Worker.from_settings(settings)
    worker.close()
    if not worker.model.cold_start.prepared:
        return Outcome(prepared=False)
    if not drop:
        return Outcome(prepared=True)
    modulation = worker.model.transformer.modulation
    for name in modulation.layers:  # what no start reads, and so no start checks
        modulation.read(name)
    return Outcome(True, dropping.drop(entry, settings))
