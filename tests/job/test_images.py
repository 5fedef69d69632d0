"""Pictures from callers: hostile until shown otherwise."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from image_worker.errors import InvalidImage
from image_worker.job import images
from image_worker.job.budget import Budget
from image_worker.job.request import ImageSource
from tests.conftest import make_picture
from tests.pictures import encoded
from tests.waiting import SECONDS
from tests.worker_jobs import as_base64


def load(sources: Sequence[tuple[str, ImageSource]]) -> list[Image.Image]:
    return images.load_images(sources, Image.Image.copy)


def png(width: int, height: int, bits: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of any colour type; `extra` are whole chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG that claims to be huge."""
    return png(width, height, 8, 2, b"\0" * 1000)


def gif_bomb() -> bytes:
    """A GIF of 16x16 whose one frame is huge."""
    data = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    frame = data.index(b",", 13)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan, an empty one."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def profile(red: str = "r", green: str = "g") -> bytes:
    """An ICC profile with the primaries of sRGB and a gamma of 2.2; two of them can be swapped."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65_536) for v in values))

    primaries = {
        "r": xyz(0.4361, 0.2225, 0.0139),
        "g": xyz(0.3851, 0.7169, 0.0971),
        "b": xyz(0.1431, 0.0606, 0.7141),
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": primaries[red],
        b"gXYZ": primaries[green],
        b"bXYZ": primaries["b"],
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        start = 128 + 4 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", start, len(value))
        body += value + b"\0" * (-len(value) % 4)
    header = struct.pack(">I4sI", 128 + len(table) + len(body), b"none", 0x0210_0000)
    header += b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", 63_190, 65_536, 54_061)
    return header.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(form: str) -> None:
    found = images.decode(encoded(make_picture(40, 30), form))
    assert (found.mode, found.size) == ("RGB", (40, 30))


def test_transparency_becomes_white() -> None:
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert images.decode(encoded(picture)).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_photo_is_turned_upright(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture = Image.new("RGB", (40, 30), "white")
    picture.paste("black", (0, 0, 40, 15))
    found = images.decode(encoded(picture, form, exif=exif))
    assert found.size == (30, 40)
    dark, light = found.getpixel((25, 20)), found.getpixel((5, 20))
    assert max(dark) < 20 and min(light) > 235, "the top is on the right now"  # type: ignore


def test_16_bit_grey_is_scaled() -> None:
    values = np.full((16, 16), 0x8000, np.uint16)
    assert images.decode(encoded(Image.fromarray(values))).getpixel((0, 0)) == (128, 128, 128)


def _two_halves(mode: str) -> Image.Image:
    """Left half transparent red, right half opaque blue, in any mode with transparency."""
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (8, 0, 16, 16))
    return picture.convert(mode) if mode != "P" else picture.quantize(4)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "GIF"), ("P", "PNG"), ("LA", "PNG")],
)
def test_every_kind_of_transparency(mode: str, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    found = images.decode(encoded(_two_halves(mode), form, **options))
    blue = (29, 29, 29) if mode == "LA" else (0, 0, 255)
    assert (found.getpixel((2, 2)), found.getpixel((12, 2))) == ((255, 255, 255), blue)


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(Image.new("1", (16, 16), 1)), (255, 255, 255)),
        (encoded(Image.new("L", (16, 16), 77)), (77, 77, 77)),
        (encoded(Image.new("P", (16, 16), 0), "GIF"), (0, 0, 0)),
        (png(16, 16, 2, 0, b"\0\x55\x55\x55\x55" * 16), (85, 85, 85)),
        (png(16, 16, 16, 2, (b"\0" + b"\x80\x01\x40\x01\x20\x01" * 16) * 16), (128, 64, 32)),
        (png(16, 16, 16, 6, (b"\0" + b"\x80\x01" * 3 * 16 + b"\0\0" * 16) * 16), None),
        (
            png(16, 16, 16, 0, (b"\0" + b"\x80\1" * 16) * 16, chunk(b"tRNS", b"\x80\1")),
            None,
        ),
        (
            png(16, 16, 8, 2, (b"\0" + b"\1\2\3" * 16) * 16, chunk(b"tRNS", b"\0\1\0\2\0\3")),
            (255, 255, 255),
        ),
        (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    ],
)
def test_every_kind_of_pixel(data: bytes, pixel: tuple[int, int, int] | None) -> None:
    found = images.decode(data)
    assert (found.mode, found.size) == ("RGB", (16, 16))
    assert pixel is None or found.getpixel((4, 4)) == pixel


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "MPO"])
def test_of_a_film_the_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).is_animated  # type: ignore[attr-defined]
    assert np.allclose(images.decode(data).getpixel((4, 4)), (255, 0, 0), atol=2)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_colours_are_those_of_the_profile(form: str) -> None:
    picture = Image.new("RGB", (16, 16), (200, 60, 60))
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    plain = images.decode(encoded(picture, form, icc_profile=profile(), **options))
    swapped = images.decode(encoded(picture, form, icc_profile=profile("g", "r"), **options))
    assert np.allclose(plain.getpixel((4, 4)), (200, 60, 60), atol=4)
    assert np.allclose(swapped.getpixel((4, 4)), (60, 200, 60), atol=4)


def test_transparency_and_palettes_keep_their_profile() -> None:
    red = Image.new("RGB", (16, 16), (200, 60, 60))
    for picture in (red.convert("RGBA"), red.quantize(4)):
        data = encoded(picture, icc_profile=profile("g", "r"))
        assert np.allclose(images.decode(data).getpixel((4, 4)), (60, 200, 60), atol=4)


def test_srgb_is_left_as_it_is() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = make_picture()
    found = images.decode(encoded(picture, icc_profile=srgb))
    assert np.abs(np.asarray(found, np.int16) - np.asarray(picture)).max() <= 1


@pytest.mark.parametrize(
    "icc", [b"x", b"\0" * 200, profile()[:150], profile()[:300] + b"\xff" * 300]
)
def test_a_broken_profile_is_left_out(icc: bytes) -> None:
    picture = make_picture()
    found = images.decode(encoded(picture, icc_profile=icc))
    assert np.array_equal(found, picture)


def test_a_profile_of_another_kind_is_left_out() -> None:
    picture = make_picture().convert("L")
    assert np.array_equal(
        images.decode(encoded(picture, icc_profile=profile())), picture.convert("RGB")
    )


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
        (bomb(0, 30), "cannot be read"),
        (gif_bomb(), "million"),
        (encoded(Image.new("P", (8000, 8000)), "GIF"), "million"),
        (encoded(Image.new("1", (8000, 8000)), "BMP"), "million"),
        (encoded(Image.new("RGB", (8000, 8000)), "WEBP", lossless=True, method=0), "million"),
        (scan_bomb(images.MAX_SCANS), "scans"),
        (encoded(make_picture(40, 30), "WEBP")[:-9], "cannot be read"),
        (encoded(make_picture(40, 30), "BMP")[:-9], "cannot be read"),
        (encoded(make_picture(4, 30)), "sides must be"),
        (encoded(make_picture(300, 30)), "8 times"),
    ],
)
def test_what_is_no_acceptable_picture(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        images.decode(data)


def test_what_only_looks_like_a_scan_bomb() -> None:
    assert images.decode(scan_bomb(10)).size == (64, 64)
    comment = b"\xff\xda" * 1000
    data = encoded(make_picture(40, 30), "JPEG", comment=comment)
    assert images.decode(data + comment).size == (40, 30)


def test_a_false_label_does_no_harm() -> None:
    text = "data:image/jpeg;base64," + as_base64(make_picture(40, 30))
    assert images.decode(images.decode_base64(text)).size == (40, 30)


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
        load(sources)
    assert caught.value.field == "images[1]"


def test_memory_that_runs_out_is_not_the_callers_fault(monkeypatch: Any) -> None:
    def fail(_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_to_rgb", fail)
    with pytest.raises(MemoryError):
        images.decode(encoded(make_picture()))


def source(width: int, height: int) -> tuple[str, ImageSource]:
    return "image", ImageSource(base64=as_base64(make_picture(width, height)))


def test_small_pictures_of_several_jobs_are_used_side_by_side() -> None:
    meeting = threading.Barrier(3)

    def use(_: Image.Image) -> None:
        meeting.wait(SECONDS)

    with ThreadPoolExecutor(2) as pool:
        jobs = [[source(16, 16)] * 2, [source(16, 16)]]
        assert len(list(pool.map(lambda job: images.load_images(job, use), jobs))) == 2


def test_pictures_of_all_jobs_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = source(16, 16), source(64, 64)
    budget = 3 * 16 * 16
    monkeypatch.setattr(images, "_PIXELS", Budget(budget))
    lock, held = threading.Lock(), [0]

    def use(image: Image.Image) -> int:
        pixels = image.width * image.height
        with lock:
            held[0] += pixels
        time.sleep(0.02)
        with lock:
            assert held[0] <= budget or held[0] == pixels, "too many, and not one alone"
            held[0] -= pixels
        return image.width

    with ThreadPoolExecutor(4) as pool:
        jobs = [[small] * 4, [small, large], [large, large], [small] * 4]
        found = list(pool.map(lambda job: images.load_images(job, use), jobs))
    assert found == [[16] * 4, [16, 64], [64, 64], [16] * 4]


def test_a_picture_that_fails_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PIXELS", Budget(40 * 30))
    cut_off = base64.b64encode(encoded(make_picture(40, 30))[:400]).decode()
    good = source(40, 30)

    def fail(_: Image.Image) -> None:
        raise RuntimeError

    for _ in range(2):
        with pytest.raises(InvalidImage, match="cannot be read"):
            load([("image", ImageSource(base64=cut_off))])
        with pytest.raises(RuntimeError):
            images.load_images([good], fail)
    assert load([good])[0].size == (40, 30)
