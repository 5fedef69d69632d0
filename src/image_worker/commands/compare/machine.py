"""The machine and the versions of what computes on it: what figures depend on beside the settings.

No name of the machine and no address is among them, so that pages can be shown to others.
"""

from __future__ import annotations

import hashlib
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import image_worker

_PACKAGE = Path(image_worker.__file__).parent
_LIBRARIES = ("torch", "triton", "bitsandbytes", "numpy", "pillow")


def facts(root: Path = Path("/")) -> dict[str, Any]:
    """What a page says of the machine. Memory is in bytes; root: where /proc is."""
    import torch

    found: dict[str, Any] = {
        "card": None,
        "processor": _value(root / "proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        "threads": torch.get_num_threads(),
        "host_memory": 1024 * int(_value(root / "proc/meminfo", r"MemTotal:\s*(\d+)") or 0),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        driver = _value(root / "proc/driver/nvidia/version", r"Module.*?\s(\d+\.[\d.]+)\s")
        found["card"] = {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver,
        }
    return found


def code_version() -> str:
    """A hash of this package's sources: any change of them makes earlier figures another's."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cu") and path.is_file():
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _value(path: Path, pattern: str) -> str | None:
    """What the first group of the first match is."""
    try:
        match = re.search(pattern, path.read_text())
    except OSError:
        return None
    return match[1].strip() if match else None
