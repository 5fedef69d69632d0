"""The reply: pictures as base64, and the facts of how they were made."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

from PIL import Image

from image_worker.errors import WorkerError

MAX_REPLY_BYTES = 10_000_000  # RunPod's limit for /run


def encode_image(image: Image.Image, form: Literal["png", "jpeg", "webp"], quality: int) -> str:
    """Base64 without a prefix. `quality` is for jpeg and webp."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if form == "png" else {"quality": quality}
    image.save(buffer, form.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def success(pictures: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """The reply to a job that succeeded. The first picture also stands by itself."""
    return {"output_image_base64": pictures[0], "images": pictures, **facts}


def size_warnings(pictures: list[str]) -> list[str]:
    """A warning where RunPod may drop the reply for its size."""
    size = len(pictures[0]) + sum(len(picture) for picture in pictures)
    if size <= MAX_REPLY_BYTES:
        return []
    return [
        f"the answer has {size / 1e6:.0f} MB, and RunPod drops answers over 10 MB from /run and "
        "20 MB from /runsync; output_format jpeg or webp is smaller"
    ]


def failure(error: WorkerError) -> dict[str, Any]:
    """The reply to a job that failed."""
    return {"error": error.reply()}
