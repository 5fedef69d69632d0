"""Which packages are there, against what the project asks for. Nothing is imported for it."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires, version

from image_worker.commands.facts import Package

PROJECT = "image-worker"
# Names under which the package index has something else than what people look for: what the one
# meant has, and what the other one is.
STRANGERS = {"nunchaku": ("nunchaku/models/", "a statistics package")}

_REQUIREMENT = re.compile(r'([\w.-]+)\s*([^;]*)(?:;\s*sys_platform\s*==\s*["\'](\w+)["\'])?\s*')
_CLAUSE = re.compile(r"(==|>=|<=|<|>)\s*([\w.]+)")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": operator.eq,
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    ">": operator.gt,
}


def look_at_packages() -> tuple[tuple[Package, ...], str | None]:
    """Those that the project asks for; or why it cannot be known what that is."""
    try:
        wanted = requires(PROJECT) or []
    except PackageNotFoundError:
        return (
            (),
            f"{PROJECT} is not installed, so what it asks for is not known (pip install -e .)",
        )
    return tuple(compare(wanted, installed)), None


def compare(wanted: Iterable[str], installed: Callable[[str], str | None]) -> list[Package]:
    """Each requirement for this platform. installed(name): the version there, None without."""
    found = []
    for line in wanted:
        match = _REQUIREMENT.fullmatch(line)
        if match is None or match[3] not in (None, sys.platform):
            continue  # of another platform, or of an extra
        name, clauses = match[1], match[2].strip()
        there = installed(name)
        found.append(Package(name, clauses, there, there is not None and meets(there, clauses)))
    return found


def meets(found: str, clauses: str) -> bool:
    """Whether a version is as "==2.13.0" or ">=13,<14" say. "+cpu" and the like do not count."""
    numbers = _numbers(found.partition("+")[0])
    return all(
        _COMPARE[sign](*_alike(numbers, _numbers(bound)))
        for sign, bound in _CLAUSE.findall(clauses)
    )


def installed(name: str) -> str | None:
    """The version of a package; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def look_for_strangers() -> dict[str, str]:
    """Packages that are not what their name suggests: their versions, by their names."""
    found = {}
    for name, (part, _) in STRANGERS.items():
        try:
            there = distribution(name)
        except PackageNotFoundError:
            continue
        files = there.files
        # An editable install lists no files of its own.
        if files and not any(str(path).startswith(part) for path in files):
            is_linked = any(path.name.startswith("__editable__") for path in files)
            if not is_linked:
                found[name] = there.version
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _alike(
    first: tuple[int, ...], second: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one length: 14 is 14.0.0."""
    length = max(len(first), len(second))
    return (
        first + (0,) * (length - len(first)),
        second + (0,) * (length - len(second)),
    )
