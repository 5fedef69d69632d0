"""Pictures from callers: hostile until shown otherwise."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_worker.errors import ImageUnavailable, InvalidImage, WorkerError
from image_worker.job import images
from image_worker.job.request import ImageSource
from tests.conftest import make_picture
from tests.worker_jobs import as_base64


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(form: str) -> None:
    found = images.decode(encoded(make_picture(40, 30), form))
    assert (found.mode, found.size) == ("RGB", (40, 30))


def test_transparency_becomes_white() -> None:
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert images.decode(encoded(picture)).getpixel((3, 3)) == (255, 255, 255)


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert images.decode(encoded(make_picture(40, 30), "JPEG", exif=exif)).size == (30, 40)


def test_16_bit_grey_is_scaled() -> None:
    values = np.full((16, 16), 0x8000, np.uint16)
    assert images.decode(encoded(Image.fromarray(values))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read"),
        (b"GIF89a", "cannot be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read"),
        (b"%PDF-1.4", "cannot be read"),
        (encoded(make_picture(40, 30))[:400], "cannot be read"),
        (encoded(make_picture(40, 30), "JPEG")[:300], "cannot be read"),
        (encoded(make_picture(40, 30), "TIFF"), "cannot be read"),
        (bomb(30_000, 30_000), "million"),
        (bomb(2**31 - 1, 2**31 - 1), "million"),
        (encoded(make_picture(4, 30)), "sides must be"),
        (encoded(make_picture(300, 30)), "8 times"),
    ],
)
def test_what_is_no_acceptable_picture(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        images.decode(data)


@pytest.mark.parametrize("text", ["no base64!", "aGVsbG8", "data:image/png;base64,???", "ä"])
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(InvalidImage, match="base64"):
        images.decode_base64(text)


def test_base64_with_prefix_and_line_breaks() -> None:
    text = base64.encodebytes(b"x" * 100).decode()
    assert images.decode_base64("data:image/png;base64," + text) == b"x" * 100


def test_size_is_checked_before_decoding_base64() -> None:
    for factor in (1.01, 1.2):  # after decoding, and before
        with pytest.raises(InvalidImage, match="MiB"):
            images.decode_base64("A" * (int(images.MAX_BYTES * factor) // 3 * 4))


def test_the_field_at_fault_is_named() -> None:
    good = ImageSource(base64=as_base64(make_picture()))
    sources = [("images[0]", good), ("images[1]", ImageSource(base64="!"))]
    with pytest.raises(InvalidImage) as caught:
        images.load_images(sources)
    assert caught.value.field == "images[1]"


class _Server(BaseHTTPRequestHandler):
    picture = encoded(make_picture(40, 30))

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/endless":
            self._start()
            self._send(b"x" * 2**20, times=25)
        elif self.path == "/declared":
            self.send_response(200)
            self.send_header("Content-Length", str(21 * 2**20))
            self.end_headers()
        elif self.path == "/busy":
            self.send_error(503)
        elif self.path == "/drip":
            self._start()
            self._send(b"x", times=100, pause=0.05)
        elif self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        else:
            self._start()
            self._send(self.picture)

    def _start(self) -> None:
        self.send_response(200)
        self.end_headers()

    def _send(self, data: bytes, times: int = 1, pause: float = 0.0) -> None:
        try:
            for _ in range(times):
                self.wfile.write(data)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            return  # the client has hung up, as it should

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()


@pytest.fixture
def trusting(monkeypatch: Any) -> None:
    """The SDK's own switch, so that a server on this machine can stand in for the internet."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")


def test_addresses_of_this_machine_are_refused(server: str) -> None:
    for url in (server, "http://169.254.169.254/latest", "http://0x7f000001/", "http://[::1]/"):
        with pytest.raises(InvalidImage, match="public address"):
            images.fetch(url)


def test_a_picture_is_fetched(server: str, trusting: None) -> None:
    [found] = images.load_images([("image_url", ImageSource(url=f"{server}/picture"))])
    assert found.size == (40, 30)


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("/missing", InvalidImage, "answered 404"),
        ("/busy", ImageUnavailable, "answered 503"),
        ("/endless", InvalidImage, "over 20 MiB"),
        ("/declared", InvalidImage, "over 20 MiB"),
        ("/away", InvalidImage, "not allowed"),
    ],
)
def test_a_fetch_that_fails(
    path: str, kind: type[WorkerError], reason: str, server: str, trusting: None
) -> None:
    with pytest.raises(kind, match=reason):
        images.fetch(server + path)


def test_a_slow_drip_ends_at_the_deadline(server: str, trusting: None) -> None:
    before = threading.active_count()
    with pytest.raises(ImageUnavailable, match=r"too slow|within"):
        images.fetch(f"{server}/drip", seconds=0.3)
    for _ in range(100):
        if threading.active_count() <= before + 1:  # the server's own thread may linger
            break
        time.sleep(0.05)
    assert threading.active_count() <= before + 1, "the download's thread must end, too"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://127.0.0.1:1/x.png", ImageUnavailable),
        ("http://no-such-host.invalid/x.png", ImageUnavailable),
        ("http://[::1", InvalidImage),
        ("http://127.0.0.1:99999/x.png", InvalidImage),
        ("http://", InvalidImage),
    ],
)
def test_a_url_that_leads_nowhere(url: str, kind: type[WorkerError], trusting: None) -> None:
    with pytest.raises(kind):
        images.fetch(url)


def test_memory_that_runs_out_is_not_the_callers_fault(monkeypatch: Any) -> None:
    def fail(_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(MemoryError):
        images.decode(encoded(make_picture()))
