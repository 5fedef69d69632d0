"""Which of a repo's files a model needs: each weight once, in one format and one precision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from huggingface_hub.utils import filter_repo_objects

INDEX = ".safetensors.index.json"
WEIGHTS = ".safetensors"

# The same weights once more, in formats that are not read here.
_OTHER_FORMATS = ["*.bin", "*.bin.index.json", "*.msgpack", "*.h5", "*.onnx", "*.pt", "*.ckpt"]
_VARIANT = re.compile(r"(?P<plain>.+)\.\w+?(?P<shard>-\d+-of-\d+)?\.safetensors")


def needed(paths: Iterable[str], patterns: list[str]) -> list[str]:
    """Those of `paths` that match a pattern; no other formats, nor variants of what is there."""
    chosen = set(
        filter_repo_objects(paths, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS)
    )
    return sorted(path for path in chosen if not _originals(path) & chosen)


def without_other_weights(paths: Iterable[str], shards: Mapping[str, Iterable[str]]) -> list[str]:
    """`paths`, less the weights beside an index that it does not name.

    shards: by the path of an index, the names of the files that it has.
    """
    named: dict[str, set[str]] = {}
    for index in sorted(shards):  # of several in a folder the first, which is the one that is read
        named.setdefault(_folder(index), {f"{_folder(index)}/{name}" for name in shards[index]})
    return [
        path
        for path in paths
        if not path.endswith(WEIGHTS) or path in named.get(_folder(path), {path})
    ]


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _originals(path: str) -> set[str]:
    """What `model.fp16.safetensors`, or a shard of it, would be a variant of."""
    match = _VARIANT.fullmatch(path)
    if match is None:
        return set()
    plain = match["plain"]
    return {f"{plain}{WEIGHTS}", f"{plain}{match['shard'] or ''}{WEIGHTS}", f"{plain}{INDEX}"}
