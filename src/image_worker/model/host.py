"""How much of the host's memory this process can still have."""

from __future__ import annotations

from pathlib import Path

HOST_RESERVE = 4 * 2**30  # bytes: for the libraries, the prompts' embedding and pictures


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes, of the machine or of the container, whichever has less; None where nobody says.

    root: where /proc and /sys are.
    """
    found = [_of_machine(root / "proc/meminfo"), _of_container(root / "sys/fs/cgroup")]
    return min((number for number in found if number is not None), default=None)


def _of_machine(path: Path) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_container(folder: Path) -> int | None:
    """By control groups, version 2 or 1. Cached files count as free: they make way."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _lines(folder / limit), _lines(folder / usage)
        if most and used and most[0].isdigit():
            statistics = _lines((folder / limit).with_name("memory.stat"))
            values = dict(line.split() for line in statistics if len(line.split()) == 2)
            return int(most[0]) - int(used[0]) + int(values.get(cached, 0))
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
