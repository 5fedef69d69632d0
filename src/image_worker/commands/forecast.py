"""What a start would do on a card: the plan that it makes, from sizes that need no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import get_args

import torch

from image_worker.catalog import CATALOG, ModelEntry
from image_worker.checkpoints import lightning_of, parse, published
from image_worker.commands.facts import Card, Forecast, Row
from image_worker.errors import DoesNotFit, InvalidSettings
from image_worker.model import components, from_checkpoint, numbers
from image_worker.model.checkpoint import Checkpoint
from image_worker.model.full_sizes import FOLDER, FullSize, full_size
from image_worker.model.hardware import GIB, Hardware
from image_worker.model.opening import in_own_format
from image_worker.model.placement import Plan, Sizes, plan
from image_worker.model.wide import Wide
from image_worker.settings import Precision, Settings

# Of the README's table of whole jobs: 1024² with one reference, Lightning 4 steps, everything on
# the card. Nothing else is quoted, and nothing is estimated.
MEASURED_ON = "NVIDIA H200"
MEASURED: dict[str, float] = {"4bit": 0.92, "fp8": 0.89}  # seconds
_UNKNOWN = "not measured on this card"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def forecast(
    settings: Settings,
    entry: ModelEntry,
    card: Card | None,
    host: int | None,
    opened: Mapping[str, Checkpoint | Wide] = MappingProxyType({}),
) -> Forecast:
    """For a model of the catalogue; of the miniature, which fits anywhere, there is no table.

    card: None without one, and then there is no table either; host: bytes of its memory that are
    free; opened: files that components' weights are in instead of the folder's, by the components'
    names, if they are here. A CHECKPOINT that is not, and is known to be like a precision of ours,
    counts as that, unless it is to be decoded.
    """
    shown = CATALOG["edit-2509"] if entry.name == "mini" else entry
    stored = _as_stored(shown, settings, opened if entry is shown else {})
    model = stored.model
    rows: tuple[Row, ...] = ()
    chosen, problem, from_disk, held = None, None, False, 0
    hardware = _hardware(settings, card, host)
    if hardware is not None and card is not None:
        rows = tuple(_row(_only(settings, one), stored, hardware, one) for one in PRECISIONS)
        if entry is shown:
            try:
                decided = plan(settings, model.sizes, model.shape, hardware)
                chosen = _as_row(settings, decided, hardware, stored)
                from_disk, held = decided.from_disk, _held(decided, model)
                problem = _refused(settings, decided.precision, hardware, stored.like)
            except DoesNotFit as error:
                problem = str(error)
    elif entry is shown:
        first = "bf16" if settings.precision_mode == "auto" else settings.precision_mode
        held = model.prepared(first)
    return Forecast(
        of=shown.name,
        rows=rows,
        chosen=chosen,
        problem=problem,
        from_disk=from_disk,
        host=held,
        checkpoint=model.checkpoint
        - (model.transformer if settings.checkpoint else 0)
        - (model.text_encoder if settings.text_encoder_checkpoint else 0),
        adapter=model.lora if _adds_lightning(settings) else 0,
        prepared={
            one: model.prepared(one, whole=settings.keep_prepared == "whole") for one in PRECISIONS
        },
        label=stored.label,
        text_label=stored.text_label,
    )


@dataclass(frozen=True)
class _Stored:
    """A model with the weights of single files.

    like: the precision of ours that its transformer is like in its products; label, text_label: as
    of `Forecast`. None: precisions say it.
    """

    model: FullSize
    like: Precision | None = None
    label: str | None = None
    text_label: str | None = None


def _as_stored(
    entry: ModelEntry, settings: Settings, opened: Mapping[str, Checkpoint | Wide]
) -> _Stored:
    model = full_size(entry, settings)
    beside = model.lora if _adds_lightning(settings) else 0
    own = in_own_format(opened.get(components.TRANSFORMER.name))
    own_text = in_own_format(opened.get(components.TEXT_ENCODER.name))
    text_label = own_text.label if own_text else None
    if own or own_text:
        sizes = components.sizes(
            FOLDER,
            settings,
            torch.bfloat16,
            has_weights=False,
            checkpoints=opened,
            beside=beside if own else 0,
        )
        model = replace(model, sizes=sizes)
    if own:
        return _Stored(model, from_checkpoint.like(own), own.label, text_label)
    like = None if components.TRANSFORMER.name in opened else _like(settings)
    if like is None:
        return _Stored(model, text_label=text_label)
    whole = full_size(entry, settings.model_copy(update={"quantize_components": "all"}))
    model = _with_blocks(model, whole.sizes[like], beside)
    return _Stored(model, like, f"weights like {like}", text_label)


def _like(settings: Settings) -> Precision | None:
    if settings.checkpoint is None or settings.checkpoint_decode:
        return None
    known = published(parse(settings.checkpoint))
    return known.like if known else None


def _adds_lightning(settings: Settings) -> bool:
    return settings.use_lightning_lora and not lightning_of(settings)


def _with_blocks(model: FullSize, like: Sizes, beside: int) -> FullSize:
    """The model with that transformer's blocks, of which nearly all of its weights are.

    beside: bytes that are on the card with them for good.
    """
    name = f"{components.TRANSFORMER.name}/blocks"
    sizes = {
        precision: replace(
            found, rest=found.rest + beside, blocks={**found.blocks, name: like.blocks[name]}
        )
        for precision, found in model.sizes.items()
    }
    return replace(model, sizes=sizes)


def products(
    settings: Settings, precision: Precision, hardware: Hardware, like: Precision | None = None
) -> str:
    """What the transformer multiplies in. like: what its weights count as, if not `precision`.

    Raises:
        InvalidSettings: the card cannot what the settings ask for.
    """
    dtype = numbers.choose_dtype(settings, hardware)
    stored = like or (precision if settings.quantize_components == "all" else "bf16")
    found = numbers.choose_products(settings, stored, hardware, dtype)
    if found != "bf16":
        return found
    if stored == "8bit":
        return "LLM.int8()"
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def _products(
    settings: Settings, precision: Precision, hardware: Hardware, like: Precision | None
) -> str:
    try:
        return products(settings, precision, hardware, like)
    except InvalidSettings:
        return "impossible"


def _hardware(settings: Settings, card: Card | None, host: int | None) -> Hardware | None:
    """As the plan wants it; None: there is no card, or nobody says how much memory it has."""
    if card is None or card.free is None or card.capability is None:
        return None
    free = card.free
    if settings.gpu_max_gib is not None:
        free = min(free, int(settings.gpu_max_gib * GIB))
    return Hardware(card.name, free, card.capability >= (8, 0), card.capability, host)


def _only(settings: Settings, precision: Precision) -> Settings:
    """The same with this precision. The older name for offloading 8bit becomes the newer one."""
    update: dict[str, object] = {"precision_mode": precision, "int8_cpu_offload": False}
    if settings.int8_cpu_offload:
        update["cpu_offload"] = "stream"
    return settings.model_copy(update=update)


def _row(settings: Settings, stored: _Stored, hardware: Hardware, precision: Precision) -> Row:
    try:
        decided = plan(settings, stored.model.sizes, stored.model.shape, hardware)
        return _as_row(settings, decided, hardware, stored)
    except DoesNotFit as error:
        multiplied = _products(settings, precision, hardware, stored.like)
        return Row(precision, "no", None, multiplied, _UNKNOWN, str(error))


def _as_row(settings: Settings, decided: Plan, hardware: Hardware, stored: _Stored) -> Row:
    is_own = stored.label or stored.text_label
    measured = None if is_own else MEASURED.get(decided.precision)
    is_known = measured is not None and MEASURED_ON in hardware.name and not decided.streamed
    passing = "blocks pass, from disk" if decided.from_disk else "blocks pass"
    return Row(
        precision=decided.precision,
        places=passing if decided.streamed else "all stay",
        peak=decided.peak,
        products=_products(settings, decided.precision, hardware, stored.like),
        speed=f"{measured} s a job on an {MEASURED_ON}" if is_known else _UNKNOWN,
        why=decided.describe(),
    )


def _refused(
    settings: Settings, precision: Precision, hardware: Hardware, like: Precision | None
) -> str | None:
    """What a start would refuse of this card, although the model fits."""
    try:
        products(settings, precision, hardware, like)
        numbers.attends_in_int8(settings, hardware, numbers.choose_dtype(settings, hardware))
    except InvalidSettings as error:
        return str(error)
    return None


def _held(decided: Plan, model: FullSize) -> int:
    """Bytes of weights that the host's memory holds."""
    sizes = model.sizes[decided.precision]
    passing = sum(
        size
        for name, blocks in sizes.blocks.items()
        for number, size in enumerate(blocks)
        if f"{name}.{number:02d}" in decided.streamed
    )
    return model.host + (0 if decided.from_disk else passing)
