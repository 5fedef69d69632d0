"""The ways that `compare` compares: each a name and the settings that make it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from pydantic import SecretStr

from image_worker.errors import InvalidSettings
from image_worker.settings import Precision, Settings, environment

PRECISIONS: tuple[str, ...] = get_args(Precision)
_NAME = re.compile(r"[\w.+ -]{1,40}")
_NEXT = re.compile(r",(?=[A-Z][A-Z0-9_]*=)")  # a value may have commas, too

# A job comes from nowhere and its picture goes to a file; its picture is the same each time, and
# people's are not, so nothing is remembered.
ALWAYS = {
    "RUNPOD_WEBHOOK_GET_JOB": "",
    "BUCKET_ENDPOINT_URL": "",
    "BUCKET_ACCESS_KEY_ID": "",
    "BUCKET_SECRET_ACCESS_KEY": "",
    "BUCKET_NAME": "",
    "REMEMBER_MB": "0",
}


@dataclass(frozen=True)
class Way:
    """variables: of the environment, on top of what is set; loras: files to merge."""

    name: str
    variables: tuple[tuple[str, str], ...]
    loras: tuple[str, ...] = ()


def parse(texts: Sequence[str], loras: Sequence[Path] = ()) -> list[Way]:
    """The ways that the command line names; all precisions if none. With LoRAs each of them twice,
    the second time with these merged.

    Raises:
        InvalidSettings: one is no way, has a variable that there is not, or a name that is taken.
    """
    ways = [_way(text) for text in texts or PRECISIONS]
    if loras:
        files = tuple(str(path.absolute()) for path in loras)
        merged = [replace(way, name=f"{way.name} + LoRA", loras=files) for way in ways]
        ways = [way for pair in zip(ways, merged, strict=True) for way in pair]
    names = [way.name for way in ways]
    taken = sorted({name for name in names if names.count(name) > 1})
    if taken:
        raise InvalidSettings(f"two ways are called {taken[0]!r}; give them names of their own")
    return ways


def settings_of(way: Way) -> dict[str, str]:
    """Its settings where they are not the defaults. No secret is among them.

    Raises:
        InvalidSettings: as of `Settings.from_env`.
    """
    settings = Settings.from_env(environment({**ALWAYS, **dict(way.variables)}))
    return {
        name.upper(): str(int(value) if isinstance(value, bool) else value)
        for name, field in Settings.model_fields.items()
        if (value := getattr(settings, name)) is not None
        and not isinstance(value, SecretStr)
        and value != field.get_default(call_default_factory=True)
    }


def _way(text: str) -> Way:
    if text in PRECISIONS:
        return Way(text, (("PRECISION_MODE", text),))
    name, mark, rest = _split(text)
    if not mark or not rest or not _NAME.fullmatch(name):
        raise InvalidSettings(
            f"{text!r} is no way; allowed: {', '.join(PRECISIONS)}, NAME=CHECKPOINT, or "
            "NAME:VARIABLE=value,VARIABLE=value"
        )
    if mark == "=":
        return Way(name, (("CHECKPOINT", rest),))
    pairs = [part.partition("=") for part in _NEXT.split(rest)]
    for variable, equals, _ in pairs:
        if not equals or variable.lower() not in Settings.model_fields or not variable.isupper():
            raise InvalidSettings(f"{text!r}: there is no setting {variable!r}")
    return Way(name, tuple((variable, value) for variable, _, value in pairs))


def _split(text: str) -> tuple[str, str, str]:
    """Name, the first of = and :, and what comes behind it."""
    found = re.search("[=:]", text)
    if found is None:
        return text, "", ""
    return text[: found.start()], found[0], text[found.end() :]
