"""What environment variables may be set to, in words: for errors and for the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo


def explain(
    error: ValidationError, fields: Mapping[str, FieldInfo], values: Mapping[str, str]
) -> list[str]:
    """A line for each bad variable: its value, and what is allowed. fields, values: by name."""
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0])
        allowed = allowed_values(fields[name])
        lines.append(f"{name.upper()}={values[name]!r} is not valid; allowed: {allowed}")
    return lines


def allowed_values(field: FieldInfo) -> str:
    """What a variable may be set to, in words."""
    choices = [choice for part in _parts(field.annotation) for choice in get_args(part)]
    if choices:
        return ", ".join(str(choice) for choice in choices)
    if field.annotation is bool:
        return "1 or 0 (also true or false, yes or no, on or off)"
    bounds = {
        name: getattr(limit, name)
        for limit in field.metadata
        for name in ("gt", "ge", "le")
        if hasattr(limit, name)
    }
    kind = "a whole number" if field.annotation is int else "a number"
    if "gt" in bounds:
        return f"{kind} above {bounds['gt']}, up to {bounds['le']}"
    if bounds:
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    return "text"


def _parts(annotation: Any) -> list[Any]:
    """The `Literal` parts of an annotation, looking through `X | None`."""
    if get_origin(annotation) is Literal:
        return [annotation]
    return [part for part in get_args(annotation) if get_origin(part) is Literal]
