"""Jobs for tests of the worker."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from tests.conftest import make_picture
from tests.pictures import encoded


def as_base64(image: Image.Image, form: str = "PNG") -> str:
    """A picture as callers send it."""
    return base64.b64encode(encoded(image, form)).decode()


def job(**options: Any) -> dict[str, Any]:
    """A small job that works, with `options` on top; an option of None is left out."""
    given = {
        "prompt": "make the red circle blue",
        "image_base64": as_base64(make_picture()),
        "num_inference_steps": 2,
        **options,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return {"id": "test", "input": given}


def picture(reply: dict[str, Any], number: int = 0) -> Image.Image:
    """A picture of a reply."""
    return Image.open(io.BytesIO(base64.b64decode(reply["images"][number])))
