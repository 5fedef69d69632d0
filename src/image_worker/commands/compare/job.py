"""The job that all ways of a comparison do."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_worker.catalog import ModelEntry
from image_worker.errors import InvalidRequest
from image_worker.job.request import EditRequest

TEST_INPUT = Path("test_input.json")
PROMPT = "make the red circle blue"
_SIDE = 128
_NOT_OURS = ("seed", "num_images", "output_format", "quality", "reencode", "embed_metadata")


def make_job(
    entry: ModelEntry, images: Sequence[Path], prompt: str | None, steps: int | None
) -> dict[str, Any]:
    """The job's input, without a seed. Without pictures and prompt it is that of test_input.json,
    if that is there; a model that edits gets a drawn picture otherwise.

    Raises:
        InvalidRequest: a file cannot be read, or the model does not take such a job.
    """
    if images and prompt is None:
        raise InvalidRequest("--image needs --prompt: what is to be done with the picture")
    given: dict[str, Any] = {"prompt": prompt or PROMPT}
    if images:
        given["images"] = [_read(path) for path in images]
    elif entry.max_images:
        if prompt is None and TEST_INPUT.is_file():
            given = _of_test_input()
        else:
            given["images"] = [drawn()]
    if steps is not None:
        given["num_inference_steps"] = steps
    job = {name: value for name, value in given.items() if name not in _NOT_OURS}
    job |= {"output_format": "png", "embed_metadata": False}
    EditRequest.parse(job, entry)
    return job


def drawn() -> str:
    """A scene of plain shapes, as the miniature knows them: a PNG in base64."""
    from PIL import Image, ImageDraw

    scene = Image.new("RGB", (4 * _SIDE, 4 * _SIDE), "#e8e4da")
    pen = ImageDraw.Draw(scene)
    pen.ellipse((60, 70, 240, 250), fill="#d62828")
    pen.rectangle((290, 80, 450, 240), fill="#f2b705")
    pen.polygon([(256, 290), (150, 460), (362, 460)], fill="#2a8f4f")
    buffer = io.BytesIO()
    scene.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _read(path: Path) -> str:
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field="image") from None


def _of_test_input() -> dict[str, Any]:
    try:
        found = json.loads(TEST_INPUT.read_text())["input"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(f"{TEST_INPUT} is no job: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f'{TEST_INPUT} is no job: "input" is no object')
    return found
