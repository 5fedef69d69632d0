"""Which of a repo's files are chosen, and which are the same weights once more."""

from __future__ import annotations

import pytest

from image_worker.model.selection import needed, without_other_weights


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["a/m.safetensors", "a/m.bin", "a/m.msgpack", "a/m.h5", "b/c.json"], ["a/m.safetensors"]),
        (["a/m.safetensors", "a/m.fp16.safetensors"], ["a/m.safetensors"]),
        (["a/m.fp16.safetensors"], ["a/m.fp16.safetensors"]),
        (["a/m.safetensors", "a/m.fp16-00001-of-00002.safetensors"], ["a/m.safetensors"]),
        (
            ["a/m-00001-of-00001.safetensors", "a/m.fp16-00001-of-00001.safetensors"],
            ["a/m-00001-of-00001.safetensors"],
        ),
        (
            ["a/m.safetensors.index.json", "a/m.fp16.safetensors"],
            ["a/m.safetensors.index.json"],
        ),
        (["a/config.json", "a/merges.txt"], ["a/config.json", "a/merges.txt"]),
    ],
)
def test_each_weight_is_chosen_once(paths: list[str], chosen: list[str]) -> None:
    assert needed(paths, ["a/*"]) == chosen


def test_beside_an_index_only_its_shards_are_weights() -> None:
    paths = ["a/1.safetensors", "a/2.safetensors", "a/all.safetensors", "b/all.safetensors"]
    shards = {"a/m.safetensors.index.json": ["1.safetensors", "2.safetensors"]}
    assert without_other_weights(paths, shards) == [*paths[:2], paths[3]]
