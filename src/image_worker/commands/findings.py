"""What the doctor says of a machine: functions of facts, without a look at anything."""

from __future__ import annotations

from collections.abc import Iterator

from image_worker.catalog import CATALOG, ModelEntry, choose
from image_worker.checkpoints import model_of
from image_worker.commands.facts import CheckpointFile, Facts, Finding, Forecast, Status
from image_worker.commands.on_disk import on_disk
from image_worker.commands.packages import STRANGERS
from image_worker.compute import LEAST
from image_worker.settings import Settings

GIB = 2**30
LEAST_CAPABILITY = (7, 5)  # of the pinned torch
HOST_BYTES = 6 * GIB  # a first start at 4bit took 5.9 (README)
# A start imports none of these.
_FOR_TESTS = frozenset({"accelerate", "diffusers", "peft", "transformers"})


def served(facts: Facts) -> ModelEntry | None:
    """The model that a start would serve; None: the settings do not say."""
    if facts.settings is None:
        return None
    return choose(model_of(facts.settings), has_card=facts.card is not None)


def findings(facts: Facts, forecast: Forecast | None) -> list[Finding]:
    """All of them, in the order in which a start would meet them.

    forecast: None where torch cannot be imported, or the settings are wrong.
    """
    entry = served(facts)
    found = [*_settings(facts), *_packages(facts), *_torch(facts), *_card(facts)]
    if entry is not None and facts.settings is not None:
        found += _model(facts, facts.settings, entry, forecast)
        found += _checkpoint(facts, facts.settings, forecast)
        found += _text_encoder(facts, facts.settings)
        if facts.places is not None:
            found += on_disk(facts.settings, facts.places, entry, forecast, _coming(facts))
    return found + list(_host(facts, forecast))


def _settings(facts: Facts) -> Iterator[Finding]:
    if facts.settings_problem is None:
        yield Finding("ok", "settings", "every variable is valid")
        return
    for line in facts.settings_problem.splitlines():
        yield Finding("problem", "settings", line)


def _packages(facts: Facts) -> Iterator[Finding]:
    if facts.packages_problem:
        yield Finding("note", "packages", facts.packages_problem)
    wrong = [package for package in facts.packages if not package.fits]
    for package in wrong:
        is_needed = package.found is None and package.name not in _FOR_TESTS
        there = package.found or "not there"
        text = f"{package.name} is {there}; the project asks for {package.wanted or 'any version'}"
        yield Finding("problem" if is_needed else "note", "packages", text)
    if facts.packages and not wrong:
        yield Finding("ok", "packages", f"all {len(facts.packages)} are there, as asked for")
    for name, version in facts.strangers.items():
        part, what = STRANGERS[name]
        text = f"{name} {version} has no {part.rstrip('/').replace('/', '.')}: it is {what} of the"
        yield Finding("note", "packages", f"{text} same name, and of no use here; uninstall it")


def _torch(facts: Facts) -> Iterator[Finding]:
    torch, driver = facts.torch, facts.driver
    if torch.version is None:
        yield Finding("problem", "torch", f"it cannot be imported: {torch.problem}")
    elif torch.cuda is None and driver.cards:
        text = f"torch {torch.version} is built without CUDA, so the card is not used"
        yield Finding("problem", "torch", f"{text}; install the build that requirements.txt names")
    elif torch.card is None and driver.cards:
        yield Finding("problem", "torch", f"torch {torch.version} sees no card: {_why_none(facts)}")
    else:
        built = f"with CUDA {torch.cuda}" if torch.cuda else "without CUDA"
        yield Finding("ok", "torch", f"torch {torch.version}, {built}")


def _why_none(facts: Facts) -> str:
    built, driver = facts.torch.cuda, facts.driver.cuda
    if built and driver and int(built.partition(".")[0]) > driver[0]:
        return (
            f"it is built with CUDA {built}, and the driver runs {driver[0]}.{driver[1]} at most; "
            "choose a host with a newer driver"
        )
    return facts.torch.problem or "CUDA_VISIBLE_DEVICES may hide it"


def _card(facts: Facts) -> Iterator[Finding]:
    driver, card = facts.driver, facts.card
    if card is None:
        yield Finding(
            "note", "card", f"there is none ({driver.problem or 'the driver lists none'})"
        )
        return
    if driver.problem:
        yield Finding("note", "card", driver.problem)
    capability = card.capability
    known = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
    old = capability is not None and capability < LEAST_CAPABILITY
    text = f"{card.name}, compute capability {known}"
    yield Finding("problem" if old else "ok", "card", text + (": torch needs 7.5" if old else ""))
    if len(driver.cards) > 1:
        yield Finding("note", "card", f"there are {len(driver.cards)}; a worker uses the first")
    version = next((one.driver for one in driver.cards), None)
    if version or driver.cuda:
        cuda = f", CUDA up to {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
        yield Finding("ok", "driver", f"{version or 'of unknown version'}{cuda}")
    yield from _memory(facts)
    if capability is not None:
        yield from _numbers(capability)


def _memory(facts: Facts) -> Iterator[Finding]:
    card = facts.card
    if card is None or card.total is None or card.free is None:
        yield Finding("note", "card memory", "nobody says how much there is")
        return
    taken = facts.driver.processes
    text = f"{_gib(card.free)} of {_gib(card.total)} are free"
    yield Finding("note" if taken else "ok", "card memory", text)
    for process in taken:
        used = "an unknown amount" if process.used is None else _gib(process.used)
        where = " on one of the cards" if len(facts.driver.cards) > 1 else ""
        text = f"process {process.pid} ({process.name}) has {used}{where}"
        yield Finding("note", "card memory", text)


def _numbers(capability: tuple[int, int]) -> Iterator[Finding]:
    if capability >= (8, 0):
        yield Finding("ok", "numbers", "bf16")
    else:
        text = "no bf16: the model computes in fp16, which it can overflow"
        yield Finding("note", "numbers", text)
    if capability >= LEAST["fp8"]:
        yield Finding("ok", "numbers", "products in FP8")
    else:
        text = "no products in FP8; COMPUTE=int8 can be asked for, and has run on Hopper only"
        yield Finding("note", "numbers", text)


def _model(
    facts: Facts, settings: Settings, entry: ModelEntry, forecast: Forecast | None
) -> Iterator[Finding]:
    if entry.name == "mini":
        where = "on the CPU" if facts.torch.card is None else f"on {facts.torch.card.name}"
        yield Finding("ok", "model", f"MODEL={settings.model}: the miniature is served, {where}")
    elif forecast is None:
        yield Finding("note", "model", f"{entry.name}; what fits is not known without torch")
    elif facts.card is None:
        text = f"{entry.name} on the CPU: weights take {_gib(forecast.host)} of the host's memory"
        is_room = facts.host is None or facts.host >= forecast.host
        yield Finding(
            "note" if is_room else "problem", "model", f"{text}; how slow that is was not measured"
        )
    elif forecast.problem is not None:
        yield Finding("problem", "model", forecast.problem)
    elif forecast.chosen is None:
        text = "what fits is not known without the card's memory"
        yield Finding("note", "model", f"{entry.name}; {text}")
    else:
        row = forecast.chosen
        own = f"a {forecast.own}, the rest in " if forecast.own else ""
        text = f"{entry.name} in {own}{row.why}, products in {row.products}"
        yield Finding("ok" if row.places == "all stay" else "note", "model", text)
    if settings.model_id is not None:
        text = f"MODEL_ID={settings.model_id} is taken to be of the published size"
        yield Finding("note", "model", text)


def _checkpoint(facts: Facts, settings: Settings, forecast: Forecast | None) -> Iterator[Finding]:
    file = facts.checkpoint
    if settings.checkpoint is None:
        return
    if file is None:
        yield Finding("note", "checkpoint", "CHECKPOINT is not looked into without torch")
        return
    steps = f"Lightning for {file.lightning} steps" if file.lightning else "no Lightning"
    known = (
        f"published for {file.known_for}, with {steps} in it"
        if file.known_for
        else "not among the files that are known, so what it is shows once it is here"
    )
    like = forecast.label if forecast and forecast.label else "the model's own weights"
    yield from _file("checkpoint", file, f", with {steps} in it", f"{known}; ", like)


def _text_encoder(facts: Facts, settings: Settings) -> Iterator[Finding]:
    file = facts.text_encoder
    if settings.text_encoder_checkpoint is None:
        return
    if file is None:
        text = "TEXT_ENCODER_CHECKPOINT is not looked into without torch"
        yield Finding("note", "text encoder", text)
        return
    yield from _file("text encoder", file, "", "", "the model's own text encoder")


def _file(
    topic: str, file: CheckpointFile, content: str, known: str, like: str
) -> Iterator[Finding]:
    """content: what else is in one that is here; known: of one that is not; like: what memory is
    then forecast for.
    """
    if file.label is not None and file.size is not None:
        text = f"{file.name} is here: {file.label}, {file.size / 1e9:.1f} GB{content}"
        yield Finding("ok", topic, text)
    elif file.size is None:
        text = f"{file.name} is to be downloaded: {known}its size is not known"
        yield Finding("note", topic, f"{text}, and memory is forecast for {like}")
    if file.problem is not None:
        yield Finding("problem", topic, file.problem)


def _coming(facts: Facts) -> list[str]:
    """Variables whose files are not here."""
    files = {"CHECKPOINT": facts.checkpoint, "TEXT_ENCODER_CHECKPOINT": facts.text_encoder}
    return [name for name, file in files.items() if file is not None and file.size is None]


def _host(facts: Facts, forecast: Forecast | None) -> Iterator[Finding]:
    if facts.host is None:
        yield Finding("note", "host memory", "nobody says how much is free")
    elif forecast is not None and forecast.from_disk:
        has_any = facts.places is not None and any(
            forecast.chosen is not None
            and (folder.model, folder.precision) == (forecast.of, forecast.chosen.precision)
            for folder in facts.places.prepared
        )
        text = f"{_gib(facts.host)} are free, too little for what passes through the card: it is"
        text += " read from prepared weights on disk, every time"
        more = "" if has_any else ", and there are none: prepare them on a machine with more memory"
        yield Finding("note" if has_any else "problem", "host memory", text + more)
    else:
        entry = served(facts)
        is_full = entry is not None and entry is not CATALOG["mini"]
        is_low = is_full and facts.host < HOST_BYTES
        text = f"{_gib(facts.host)} are free"
        more = "; a first start at 4bit took 5.9 GiB" if is_low else ""
        if forecast is not None and forecast.chosen is not None:
            more += f"; weights take {_gib(forecast.host)} of it"
        yield Finding("note" if is_low else "ok", "host memory", text + more)
    is_own = facts.settings is not None and facts.settings.model_id is not None
    text = "there is one" if facts.has_token else "none; public repos need none"
    status: Status = "note" if is_own and not facts.has_token else "ok"
    yield Finding(status, "hub token", text)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
