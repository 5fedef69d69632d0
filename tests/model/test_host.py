"""The host's free memory, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_worker.model.host import free_host_memory

MEMINFO = "MemTotal: 32 kB\nMemFree: 9 kB\nMemAvailable: 20 kB\n"
V2 = {
    "memory.max": "16384\n",
    "memory.current": "9000\n",
    "memory.stat": "anon 5\ninactive_file 1000\n",
}
V1 = {
    "memory/memory.limit_in_bytes": "10000\n",
    "memory/memory.usage_in_bytes": "9000\n",
    "memory/memory.stat": "total_inactive_file 500\n",
}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 20 * 1024),
        (V2, 16384 - 9000 + 1000),
        (V2 | {"memory.max": "max\n"}, 20 * 1024),
        (V2 | {"memory.max": "999999999\n"}, 20 * 1024),
        (V1, 10000 - 9000 + 500),
    ],
)
def test_the_machine_and_the_container(
    groups: dict[str, str], expected: int, tmp_path: Path
) -> None:
    files = {"proc/meminfo": MEMINFO}
    files |= {f"sys/fs/cgroup/{name}": text for name, text in groups.items()}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_host_memory(tmp_path) == expected


def test_where_nobody_says(tmp_path: Path) -> None:
    assert free_host_memory(tmp_path) is None


def test_this_machine_has_some() -> None:
    found = free_host_memory()
    assert found is None or found > 2**20
