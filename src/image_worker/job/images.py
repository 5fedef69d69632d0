"""Pictures from callers: fetched and decoded as what they are, untrusted input.

Every limit is checked before the work that it bounds: bytes before decoding base64, a URL's
address before connecting, pixels and format from the header before decompressing. Decoded pictures
of all jobs share one `Budget`, and are used up within it: what waits holds its file's bytes only.
"""

from __future__ import annotations

import binascii
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

import pybase64
from PIL import Image, ImageCms, ImageOps
from requests import Response

from image_worker.errors import ImageUnavailable, InvalidImage, WorkerError
from image_worker.job.budget import Budget
from image_worker.job.network import Wanted, within
from image_worker.job.request import ImageSource

T = TypeVar("T")

MAX_BYTES = 20 * 2**20
MAX_JOB_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000
MAX_PIXELS_AT_A_TIME = 64_000_000  # 1 GB: one takes up to 15 bytes while it is decoded
MIN_SIDE = 8
MAX_RATIO = 8.0
MAX_SCANS = 100
FETCH_SECONDS = 30.0
_PICTURE = Wanted("the picture", InvalidImage, ImageUnavailable)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

_TOO_LARGE = f"the picture is over {MAX_BYTES // 2**20} MiB"
_WHITE_SPACE = b" \t\r\n"
_PIECE = 2**18  # characters

# A JPEG marker that starts a segment or ends the picture; stuffing and restarts are neither.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_END, _SCAN = 0xD9, 0xDA


class Allowance:
    """What the pictures of one job may take in all: seconds to fetch, and bytes."""

    def __init__(self, seconds: float = FETCH_SECONDS, size: int = MAX_JOB_BYTES) -> None:
        self._deadline = time.monotonic() + seconds
        self._left = size
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """What is left of the time, 0 or less once it is over."""
        return self._deadline - time.monotonic()

    def take(self, size: int) -> None:
        """Counts `size` bytes.

        Raises:
            InvalidImage: the job's pictures have too many bytes in all.
        """
        with self._lock:
            self._left -= size
            if self._left < 0:
                raise InvalidImage(f"the pictures are over {MAX_JOB_BYTES // 2**20} MiB in all")


_PIXELS = Budget(MAX_PIXELS_AT_A_TIME)


def load_images(
    sources: Sequence[tuple[str, ImageSource]], use: Callable[[Image.Image], T]
) -> list[T]:
    """What `use` makes of each picture of a job, as RGB, fetched side by side in `FETCH_SECONDS`.

    use: called on several threads. A picture counts as gone when it returns, so it keeps none.

    Raises:
        InvalidImage, ImageUnavailable: about the first picture at fault; `field` names it.
    """
    if not sources:
        return []
    allowance = Allowance()
    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(lambda source: _load(source[0], source[1], allowance, use), sources))


def _load(
    field: str, source: ImageSource, allowance: Allowance, use: Callable[[Image.Image], T]
) -> T:
    try:
        data = _read(source, allowance)
        with _PIXELS.take(count_pixels(data)):
            return use(decode(data))
    except WorkerError as error:
        error.field = field
        raise


def _read(source: ImageSource, allowance: Allowance) -> bytes:
    if source.url is not None:
        return fetch(source.url, allowance)
    assert source.base64 is not None
    data = decode_base64(source.base64)
    allowance.take(len(data))
    return data


def decode_base64(text: str) -> bytes:
    """The bytes behind base64, with or without a `data:` prefix.

    Raises:
        InvalidImage: not base64, or more than `MAX_BYTES`.
    """
    if text.startswith("data:"):
        _, _, text = text.partition(",")
    if len(text) > MAX_BYTES * 4 // 3 * 1.1:  # line breaks included
        raise InvalidImage(_TOO_LARGE)
    try:
        data = _decoded(text)
    except (binascii.Error, ValueError):
        raise InvalidImage("the picture is neither a URL nor valid base64") from None
    if len(data) > MAX_BYTES:
        raise InvalidImage(_TOO_LARGE)
    return data


def _decoded(text: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except binascii.Error:  # line breaks, perhaps
        return pybase64.b64decode(b"".join(_without_white_space(text)), validate=True)


def _without_white_space(text: str) -> Iterator[bytes]:
    """In pieces: the interpreter, and with it the event loop, stands still during each."""
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE].encode("ascii").translate(None, _WHITE_SPACE)


def count_pixels(data: bytes) -> int:
    """Of the picture in `data`, by its header.

    Raises:
        InvalidImage: no picture, of a kind that is not accepted, or too large.
    """
    with _opened(data) as image:
        return image.width * image.height


def decode(data: bytes) -> Image.Image:
    """The picture in `data`, upright, sRGB, transparency on white; the first frame of several.

    Raises:
        InvalidImage: no picture, of a kind that is not accepted, cut off, or too large.
    """
    with _opened(data) as image:
        if image.format in ("JPEG", "MPO"):
            _check_scans(data)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose header is right; what fails in the context is the picture's fault.

    Closed afterwards: an error's traceback would keep its pixels otherwise.
    """
    try:
        with closing(Image.open(io.BytesIO(data), formats=_FORMATS)) as image:
            _check_header(image)
            yield image
    except (InvalidImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before ours
        raise InvalidImage(f"the picture has over {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:
        raise InvalidImage(
            f"the picture cannot be read; accepted are {', '.join(_FORMATS)}, undamaged"
        ) from error


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidImage(
            f"the picture has {width}x{height} pixels; at most {MAX_PIXELS // 10**6} million"
        )
    if min(width, height) < MIN_SIDE:
        raise InvalidImage(f"the picture is {width}x{height}; sides must be {MIN_SIDE} or more")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidImage(
            f"the picture is {width}x{height}; no side may be over {MAX_RATIO:g} times the other"
        )


def _check_scans(data: bytes) -> None:
    """Each scan of a JPEG is a pass over all of it, and takes as little as ten bytes."""
    scans, position = 0, 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = data[marker.start() + 1]
        if kind == _END:
            break
        scans += kind == _SCAN
        if scans > MAX_SCANS:
            raise InvalidImage(f"the picture has over {MAX_SCANS} scans; save it as a plain JPEG")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would cut off, not scale
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """From the colours of an ICC profile. One that is broken or of another kind is left out."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def fetch(url: str, allowance: Allowance | None = None) -> bytes:
    """The body behind `url`, from public addresses only.

    Raises:
        ImageUnavailable: not answering, busy, or too slow.
        InvalidImage: refused, not found or too large.
    """
    allowed = allowance or Allowance()
    late = ImageUnavailable(f"the picture did not arrive within {FETCH_SECONDS:g} seconds")
    return within(
        allowed.seconds, lambda: _PICTURE.fetch(url, lambda answer: _body(answer, allowed)), late
    )


def _body(response: Response, allowance: Allowance) -> bytes:
    _PICTURE.check(response, MAX_BYTES, _TOO_LARGE)
    data = bytearray()
    # read1 returns after one read of the socket, so a slow drip meets the deadline.
    while chunk := response.raw.read1(2**16, decode_content=True):
        data += chunk
        allowance.take(len(chunk))
        if len(data) > MAX_BYTES:
            raise InvalidImage(_TOO_LARGE)
        if allowance.seconds < 0:
            raise ImageUnavailable("the picture's server is too slow")
    return bytes(data)
