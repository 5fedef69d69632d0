"""What is in a model's folder, wherever that is: its weights' files, and its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from image_worker.errors import ModelMismatch, ModelUnavailable
from image_worker.model import selection


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, in the order in which they are read.

    Raises:
        ModelUnavailable: there are none, or the index names files that are not there.
    """
    index = next(iter(sorted(folder.glob(f"*{selection.INDEX}"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [folder / name for name in shards(index)]
    numbered = re.search(r"-of-(\d+)\.safetensors$", files[0].name) if files else None
    if numbered and len(files) != int(numbered[1]):
        raise ModelUnavailable(
            f"{folder.name}/ of the model is incomplete: {len(files)} of {int(numbered[1])} shards"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = ", ".join(missing) if missing else "its .safetensors weights"
        raise ModelUnavailable(f"{folder.name}/ of the model is incomplete: {what} missing")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ModelMismatch: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelMismatch(f"{path.parent.name}/{path.name} of the model is damaged") from error
    if not isinstance(content, dict):
        raise ModelMismatch(f"{path.parent.name}/{path.name} of the model is no JSON object")
    return content


def shards(index: Path) -> list[str]:
    """The files that an index names."""
    return sorted(set(read_json(index).get("weight_map", {}).values()))
