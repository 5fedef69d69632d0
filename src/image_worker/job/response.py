"""The reply: pictures as base64 or as links, and the facts of how they were made."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pybase64
from PIL import ExifTags, Image

from image_worker.errors import ReplyTooLarge, WorkerError
from image_worker.job import png
from image_worker.job.request import EditRequest
from image_worker.job.storage import Storage
from image_worker.settings import Settings

Format = Literal["png", "jpeg", "webp"]

_ENVELOPE = 1000  # bytes kept free for what the queue writes around a reply
_QUOTES = 4  # bytes around a text in a list, with the comma
_FALLING = (75, 60, 45, 30)  # JPEG qualities to try where a reply is too large
_MAX_EXIF = 65_000  # bytes: one JPEG segment, with room for its header
_SHORT = 2000  # characters that fit there for certain, twice


@dataclass(frozen=True)
class Outlet:
    """Where a job's pictures go: to `storage`, or into a reply of at most `max_bytes`.

    None stands for no storage, and for no limit.
    """

    job_id: str
    storage: Storage | None = None
    max_bytes: int | None = None
    embed_metadata: bool = True

    @classmethod
    def of(cls, settings: Settings, s3_config: object, job_id: str) -> Self:
        """For one job; `s3_config` is the job's `s3Config`, None or {} without.

        Blocks while the host name of a caller's storage is looked up.

        Raises:
            InvalidRequest: `s3Config` is wrong; `field` names where.
            InvalidSettings: the operator's own storage is wrong.
            StorageUnavailable: the host name of the caller's storage cannot be resolved now.
        """
        if s3_config is None or s3_config == {}:
            storage = Storage.from_settings(settings)
        else:
            storage = Storage.from_job(s3_config, settings.bucket_link_seconds)
        return cls(
            job_id=job_id,
            storage=storage,
            max_bytes=settings.max_reply_mb * 10**6 or None,
            embed_metadata=settings.embed_metadata,
        )


def make_reply(
    images: Sequence[Image.Image], request: EditRequest, facts: Mapping[str, Any], outlet: Outlet
) -> dict[str, Any]:
    """The reply to a job that succeeded: its pictures, RGB, one per seed, and `facts`.

    With storage, `image_urls` has a link to each picture and `output_image_url` is the first.
    Without, `images` has each as base64, and `output_image_base64` is the first one again, left
    out with a warning where the reply would be over its limit with it. A reply that is over it
    all the same is encoded anew, as WebP and then as ever smaller JPEG, if the request allows
    that; `output_format` and a warning say so. Blocks: call it on a thread.

    Raises:
        ReplyTooLarge: the pictures do not fit into a reply.
        StorageUnavailable: the pictures could not be stored.
        InvalidRequest: the caller's own storage refused them.
        ValueError, TypeError: `facts` is not JSON.
    """
    embed = outlet.embed_metadata if request.embed_metadata is None else request.embed_metadata
    about = _about(request, facts) if embed else [{} for _ in images]
    facts = {**facts, "output_format": request.output_format}
    facts["warnings"] = list(facts.get("warnings", ()))
    if outlet.storage is None:
        return _inline(images, request, about, facts, outlet.max_bytes)
    json.dumps(facts, allow_nan=False)  # what is not JSON should not leave pictures behind
    files = [
        encode(image, request.output_format, request.encoder_quality, texts)
        for image, texts in zip(images, about, strict=True)
    ]
    urls = outlet.storage.put(outlet.job_id, files, request.output_format)
    return {"output_image_url": urls[0], "image_urls": urls, **facts}


def failure(error: WorkerError) -> dict[str, Any]:
    """The reply to a job that failed."""
    return {"error": error.reply()}


def encode(image: Image.Image, form: Format, quality: int, about: Mapping[str, str]) -> bytes:
    """An RGB picture as a file. `quality` is for jpeg and webp.

    `about` is written into it: PNG has a text chunk for each name; JPEG and WebP have all of it
    as a JSON object in EXIF's UserComment.
    """
    if form == "png":
        return png.write(image, about)
    buffer = io.BytesIO()
    exif = {"exif": _exif(about)} if about else {}
    image.save(buffer, form.upper(), quality=quality, **exif)
    return buffer.getvalue()


def _about(request: EditRequest, facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is written into each picture, under the names of request and reply."""
    shared = {"prompt": request.prompt}
    if request.negative_prompt is not None:
        shared["negative_prompt"] = request.negative_prompt
    for name in ("model", "num_inference_steps", "true_cfg_scale"):
        if name in facts:
            shared[name] = str(facts[name])
    if facts.get("loras"):
        shared["loras"] = json.dumps(facts["loras"])
    return [{**shared, "seed": str(seed)} for seed in request.seeds]


def _exif(about: Mapping[str, str]) -> bytes:
    found = b""
    for length in (None, _SHORT):
        text = json.dumps({name: text[:length] for name, text in about.items()}, ensure_ascii=False)
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode(
            "utf-16-le"
        )
        found = exif.tobytes()
        if len(found) <= _MAX_EXIF:
            break
    return found


def _inline(
    images: Sequence[Image.Image],
    request: EditRequest,
    about: Sequence[Mapping[str, str]],
    facts: Mapping[str, Any],
    max_bytes: int | None,
) -> dict[str, Any]:
    """The reply with the pictures in it: of what was asked for and allowed, the first that fits."""
    limit = math.inf if max_bytes is None else max_bytes
    asked = 0  # bytes of the reply as asked for
    for form, quality in _attempts(request):
        pictures = [
            pybase64.b64encode_as_string(encode(image, form, quality, texts))
            for image, texts in zip(images, about, strict=True)
        ]
        warnings = list(facts["warnings"])
        if asked:
            warnings.append(
                f"as {request.output_format} the reply would have had {asked / 1e6:.1f} MB, over "
                f"its limit: the pictures were encoded as {form} of quality {quality}"
            )
        reply = {"images": pictures, **facts, "output_format": form, "warnings": warnings}
        doubled = {"output_image_base64": pictures[0], **reply}
        if _size([*pictures, pictures[0]], facts, warnings) <= limit:
            return doubled
        warnings.append("output_image_base64, the same as images[0], was left out to save space")
        size = _size(pictures, facts, warnings)
        if size <= limit:
            return reply
        asked = asked or size
    raise ReplyTooLarge(
        f"the reply would have {asked / 1e6:.1f} MB, and may have {limit / 1e6:g}; use "
        "output_format jpeg or webp, reencode true, a smaller width and height, fewer num_images, "
        "or S3 storage"
    )


def _attempts(request: EditRequest) -> Iterator[tuple[Format, int]]:
    """Formats and qualities: as asked for, then, where that is allowed, ever smaller ones."""
    asked, quality = request.output_format, request.encoder_quality
    yield asked, quality
    if request.reencode:
        if asked != "webp":
            yield "webp", quality
        for lower in _FALLING:
            if lower < quality:
                yield "jpeg", lower


def _size(pictures: Sequence[str], facts: Mapping[str, Any], warnings: Sequence[str]) -> int:
    """Bytes of a reply as JSON, at most, with what the queue writes around it.

    Base64 is as long in JSON as it is. Dumping it would keep the interpreter to this thread: 0.1 s
    for 17 MB.
    """
    rest = json.dumps({**facts, "warnings": warnings}, allow_nan=False)
    return len(rest) + sum(len(picture) + _QUOTES for picture in pictures) + _ENVELOPE
