"""Hugging Face caches on this machine: what is in them, and what their names say of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError

from image_worker.errors import ModelUnavailable

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def look(
    caches: Iterable[Path],
    name: str,
    in_cache: Callable[[Path], Path],
    tell: Callable[..., None],
) -> tuple[Path | None, list[str]]:
    """What `in_cache` finds first; or None, and what is missing where a part of it is.

    name: `owner/repo@revision` or `owner/repo/file@revision`; tell: where to log what is missing.
    """
    reasons = []
    for cache in caches:
        try:
            return in_cache(cache), []
        except (LocalEntryNotFoundError, ModelUnavailable) as error:
            if isinstance(error, ModelUnavailable):
                reasons.append(str(error))
            present = [path.name for path in cache.glob(f"models--*{_stem(name)}/snapshots/*")]
            say = tell if present else log.debug
            say("%s is not complete in %s (%s); revisions there: %s", name, cache, error, present)
    return None, reasons


def storage(repo: str, cache: Path) -> Path:
    """The folder of `cache` for a repo."""
    return cache / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, revision: str, cache: Path) -> Path | None:
    """The folder for a revision, which need not be there; None: its commit is not known."""
    commit = revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (storage(repo, cache) / "refs" / revision).read_text().strip()
        except OSError:
            return None
    return storage(repo, cache) / "snapshots" / commit if _COMMIT.fullmatch(commit) else None


def _stem(name: str) -> str:
    """`owner--repo` for `owner/repo/file@revision`."""
    return "--".join(name.partition("@")[0].split("/")[:2])
