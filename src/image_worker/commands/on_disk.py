"""What the doctor says of MODEL_DIR: functions of facts, without a look at anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from image_worker.catalog import ModelEntry
from image_worker.commands.clean import in_bytes
from image_worker.commands.facts import Finding, Forecast, Places
from image_worker.settings import Settings


def on_disk(
    settings: Settings,
    places: Places,
    entry: ModelEntry,
    forecast: Forecast | None,
    coming: Sequence[str] = (),
) -> Iterator[Finding]:
    """Findings about MODEL_DIR: what is there, what is to come, and whether it has room.

    coming: variables whose files are to be downloaded, too.
    """
    if places.problem is not None:
        yield Finding("problem", "model files", places.problem)
    free = "an unknown amount" if places.free is None else _gb(places.free)
    text = f"MODEL_DIR={places.model_dir}, {free} free"
    yield Finding("ok" if places.writable else "note", "disk", text)
    if not places.writable:
        yield Finding("note", "disk", "MODEL_DIR cannot be written: nothing is downloaded or kept")
    if entry.name != "mini" and places.problem is None:
        named = " and ".join(f"{variable}'s file" for variable in coming)
        beside = f" beside {named}" if named else ""
        yield from _download(settings, places, entry, forecast, beside)
    for folder in places.prepared:
        text = f"{folder.name} ({folder.model}, {folder.precision}): {in_bytes(folder.size)}"
        yield Finding("ok", "prepared weights", text)
    for kept in places.downloads:
        whose = "LoRAs of jobs"
        if kept.kind == "checkpoints":
            whose = "CHECKPOINT or TEXT_ENCODER_CHECKPOINT"
        text = f"for {whose}: {kept.count} files, {in_bytes(kept.size)}"
        yield Finding("ok", "downloads", f"{text} (python -m image_worker clean --{kept.kind})")
    if places.volume and not places.in_volume:
        text = "a network volume is mounted, and MODEL_DIR is not on it"
        yield Finding("note", "network volume", text)
    else:
        yield Finding("ok", "network volume", "mounted" if places.volume else "none")


def _download(
    settings: Settings, places: Places, entry: ModelEntry, forecast: Forecast | None, beside: str
) -> Iterator[Finding]:
    """beside: words for what is to be downloaded, too, and is told of elsewhere."""
    missing = [
        name
        for name, there in (("model", places.has_model), ("Lightning LoRA", places.has_adapter))
        if not there
    ]
    if not missing:
        yield Finding("ok", "model files", "the model's are all there")
    elif whole := _whole(settings, places, entry, forecast):
        text = f"{whole} may stand for what is not here: {' and '.join(missing)}"
        yield Finding("note", "model files", text)
    elif settings.local_only:
        text = f"LOCAL_ONLY=1, and not on this machine: {' and '.join(missing)}"
        yield Finding("problem", "model files", text)
    elif forecast is None:
        yield Finding("note", "model files", f"to be downloaded: {' and '.join(missing)}")
    else:
        model = 0 if places.has_model else max(0, forecast.checkpoint - places.partial)
        size = model + (0 if places.has_adapter else forecast.adapter)
        there = f" ({_gb(places.partial)} are there)" if places.partial else ""
        short = places.free is not None and places.free < size
        text = f"{_gb(size)} are to be downloaded{beside}{there}"
        is_problem = short or not places.writable
        yield Finding("problem" if is_problem else "note", "model files", text)
        yield from _room_to_prepare(settings, places, forecast, size)


def _whole(
    settings: Settings, places: Places, entry: ModelEntry, forecast: Forecast | None
) -> str | None:
    """Prepared weights that need no checkpoint, if these settings are theirs, which they may be."""
    if settings.checkpoint or settings.text_encoder_checkpoint:
        return None  # such a start reads files in any case
    if settings.keep_prepared == "0" or forecast is None or forecast.chosen is None:
        return None
    kind = (entry.name, forecast.chosen.precision)
    for folder in places.prepared:
        if folder.name.endswith("-whole") and (folder.model, folder.precision) == kind:
            return folder.name
    return None


def _room_to_prepare(
    settings: Settings, places: Places, forecast: Forecast, downloads: int
) -> Iterator[Finding]:
    row = forecast.chosen
    if row is None or settings.keep_prepared == "0" or not places.writable:
        return
    size = forecast.prepared[row.precision]
    if places.free is not None and downloads <= places.free < downloads + size:
        text = f"{_gb(size)} more to keep prepared weights are not free: each start quantises anew"
        yield Finding("note", "disk", text)
    else:
        text = f"prepared weights take {_gb(size)}, once the first start has written them"
        yield Finding("ok", "disk", text)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
