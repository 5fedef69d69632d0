"""Pictures from callers: fetched and decoded as what they are, untrusted input.

Every limit is checked before the work that it bounds: bytes before decoding base64, a URL's
address before connecting, pixels and format from the header before decompressing.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import Image, ImageOps

from image_worker.errors import ImageUnavailable, InvalidImage, WorkerError
from image_worker.job.request import ImageSource

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
MAX_RATIO = 8.0
FETCH_SECONDS = 30.0
_IDLE_SECONDS = 10  # longest silence of a server
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

_TOO_LARGE = f"the picture is over {MAX_BYTES // 2**20} MiB"
_WHITE_SPACE = dict.fromkeys(map(ord, " \t\r\n"))
_DECODING = threading.Lock()  # one at a time: 50 megapixels take 200 MB, and more on the way

T = TypeVar("T")


def load_images(sources: Sequence[tuple[str, ImageSource]]) -> list[Image.Image]:
    """All pictures of a job, as RGB, fetched side by side.

    Raises:
        InvalidImage, ImageUnavailable: about the first picture at fault; `field` names it.
    """
    if not sources:
        return []
    with ThreadPoolExecutor(len(sources)) as pool:
        return list(pool.map(lambda source: _load(*source), sources))


def _load(field: str, source: ImageSource) -> Image.Image:
    try:
        if source.url is not None:
            return decode(fetch(source.url))
        assert source.base64 is not None
        return decode(decode_base64(source.base64))
    except WorkerError as error:
        error.field = field
        raise


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
        data = base64.b64decode(text.translate(_WHITE_SPACE), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImage("the picture is neither a URL nor valid base64") from None
    if len(data) > MAX_BYTES:
        raise InvalidImage(_TOO_LARGE)
    return data


def decode(data: bytes) -> Image.Image:
    """The picture in `data`, upright, RGB, transparency on white; the first frame of several.

    Raises:
        InvalidImage: no picture, of a kind that is not accepted, cut off, or too large.
    """
    try:
        with _DECODING, Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_header(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would cut off, not scale
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def fetch(url: str, seconds: float = FETCH_SECONDS) -> bytes:
    """The body behind `url`, from public addresses only.

    Raises:
        ImageUnavailable: refused, not found, not answering, too slow or too large.
    """
    deadline = time.monotonic() + seconds
    return _within(seconds, lambda: _download(url, deadline))


def _download(url: str, deadline: float) -> bytes:
    # Resolves and checks the address, pins it, and checks every redirect again.
    from runpod.serverless.utils.rp_ssrf import SSRFError, safe_get

    data = bytearray()
    try:
        # Its own limit of size would be reported like a forbidden address: ours is below.
        with safe_get(url, timeout=_IDLE_SECONDS, max_bytes=2**62) as response:
            _check_answer(response.status_code, response.headers.get("Content-Length", ""))
            # read1 returns after one read of the socket, so a slow drip meets the deadline.
            while chunk := response.raw.read1(2**16, decode_content=True):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise InvalidImage(_TOO_LARGE)
                if time.monotonic() > deadline:
                    raise ImageUnavailable("the picture's server is too slow")
    except WorkerError:
        raise
    except SSRFError as error:
        if isinstance(error.__cause__, OSError):
            raise ImageUnavailable("the host name of the URL could not be resolved") from error
        raise InvalidImage("the URL is not allowed: it must lead to a public address") from error
    except (
        ValueError
    ) as error:  # requests' and urllib's errors about the URL itself are of this kind
        raise InvalidImage("the URL is not valid") from error
    except Exception as error:
        raise ImageUnavailable("the picture could not be fetched from its URL") from error
    return bytes(data)


def _check_answer(status: int, length: str) -> None:
    if status in (408, 425, 429) or status >= 500:
        raise ImageUnavailable(f"the picture's server answered {status}")
    if status != 200:
        raise InvalidImage(f"the picture's server answered {status}")
    if length.isdigit() and int(length[:20]) > MAX_BYTES:
        raise InvalidImage(_TOO_LARGE)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Runs `work` and stops waiting at the deadline, also where a read cannot be interrupted.

    The thread left behind ends when its server does; what it may hold is bounded by `MAX_BYTES`.
    """
    result: list[T] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 (raised again below, by the waiting thread)
            problem.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if problem:
        raise problem[0]
    if not result:
        raise ImageUnavailable(f"the picture did not arrive within {seconds:g} seconds")
    return result[0]
