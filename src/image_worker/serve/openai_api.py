"""OpenAI's image API, edits and generations, in terms of this worker's jobs.

An option of theirs that cannot be honoured is an error, never ignored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from image_worker.catalog import ModelEntry
from image_worker.errors import ErrorReply, InvalidRequest

if TYPE_CHECKING:  # it imports torch, and this module does not
    from image_worker.worker import Worker

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
ROUTES = (EDITS, GENERATIONS)

# Fields that both sides call the same; the last four are this worker's own.
SAME = (
    "prompt",
    "output_format",
    "seed",
    "num_inference_steps",
    "true_cfg_scale",
    "negative_prompt",
)
# What may be said of these is what happens anyway.
_ALREADY_SO: Mapping[str, tuple[object, ...]] = {
    "background": ("auto", "opaque"),
    "quality": ("auto", "standard"),
    "style": ("natural",),
    "input_fidelity": ("high",),
    "moderation": ("auto", "low"),
    "response_format": ("b64_json",),
    "stream": (False, "false"),
    "partial_images": (0, "0"),
}
_WITHOUT_EFFECT = ("user",)  # an identifier of the caller's own user


def to_input(route: object, fields: object, entry: ModelEntry) -> dict[str, Any]:
    """A job's input from a request's fields; pictures are texts, URLs or base64.

    Raises:
        InvalidRequest: an option that cannot be honoured; anything else is found with the job.
    """
    if not isinstance(fields, dict):
        raise InvalidRequest("the request must be a JSON object")
    given = {name: value for name, value in fields.items() if value is not None}
    if route not in ROUTES:
        raise InvalidRequest(f"there is no route {str(route)[:100]}; try {' or '.join(ROUTES)}")
    made = {name: given.pop(name) for name in SAME if name in given}
    _check_model(given.pop("model", None), entry)
    if route == EDITS:
        pictures = given.pop("image", [])
        made["images"] = pictures if isinstance(pictures, list) else [pictures]
    if "n" in given:
        made["num_images"] = given.pop("n")
    if (size := given.pop("size", "auto")) != "auto":
        made["width"], made["height"] = _size(size)
    if "output_compression" in given:
        made["quality"] = given.pop("output_compression")
    for name, value in given.items():
        if name in _WITHOUT_EFFECT or value in _ALREADY_SO.get(name, ()):
            continue
        allowed = ", ".join(str(choice) for choice in _ALREADY_SO.get(name, ()))
        reason = f"only {allowed} is possible here" if allowed else "this server has no such option"
        raise InvalidRequest(f"{name}: {reason}", field=name)
    return made


async def run(
    worker: Worker, job: Mapping[str, Any], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """A job of RunPod's queue to its reply, in OpenAI's terms if its input has `openai_route`."""
    given = job.get("input")
    if not isinstance(given, dict) or "openai_route" not in given:
        return await worker.run(job, progress)
    try:
        fields = given.get("openai_input")
        made = to_input(given["openai_route"], fields, worker.entry)
    except InvalidRequest as error:
        return error_body(error.reply())
    reply = await worker.run({**job, "input": made}, progress)
    return error_body(reply["error"]) if "error" in reply else answer(reply)


def _check_model(name: object, entry: ModelEntry) -> None:
    if name not in (None, entry.name, entry.repo):
        raise InvalidRequest(
            f"this server has the model {entry.name}; there is no {str(name)[:100]}", field="model"
        )


def _size(text: object) -> Sequence[int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    if not found:
        raise InvalidRequest("size must be auto or as in 1024x768", field="size")
    return int(found[1]), int(found[2])


def answer(reply: Mapping[str, Any]) -> dict[str, Any]:
    """A reply without error, as OpenAI's clients expect it."""
    if "images" in reply:
        data = [{"b64_json": picture} for picture in reply["images"]]
    else:
        data = [{"url": url} for url in reply["image_urls"]]
    return {
        "created": int(time.time()),
        "data": data,
        "size": f"{reply['width']}x{reply['height']}",
        "output_format": reply["output_format"],
        "seeds": reply["seeds"],
        "warnings": reply["warnings"],
    }


def error_body(error: ErrorReply) -> dict[str, Any]:
    """An error, as OpenAI's clients expect it."""
    kind = "server_error" if error["retryable"] else "invalid_request_error"
    return {
        "error": {
            "message": error["message"],
            "type": kind,
            "param": error.get("field"),
            "code": error["type"],
        }
    }
