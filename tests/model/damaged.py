"""Files that are not what was written."""

from __future__ import annotations

from pathlib import Path


def damage(path: Path, how: str) -> None:
    """Takes the file away, its last byte, or changes a bit of one byte."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "cut off":
        content = content[:-1]
    else:
        places = {"header": 20, "middle": len(content) // 2, "last chunk": -513, "last": -1}
        content[places[how]] ^= 4
    path.write_bytes(content)
