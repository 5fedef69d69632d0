"""PNG files hold the picture and the texts, for Pillow and for the format's own checks."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from image_worker.job import png
from tests.conftest import make_picture
from tests.pictures import encoded


def read(content: bytes) -> Image.Image:
    Image.open(io.BytesIO(content)).verify()  # checksums
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (16, 16), (333, 97), (1024, 1024)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "black"])
def test_the_picture_comes_back(size: tuple[int, int], kind: str) -> None:
    image = Image.new("RGB", size)
    if kind == "smooth":
        image = make_picture(*size)
    if kind == "noise":
        values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(values)
    found = read(png.write(image, {}))
    assert (found.format, found.mode, found.size) == ("PNG", "RGB", size)
    assert np.array_equal(np.asarray(found), np.asarray(image))


def test_texts_come_back() -> None:
    texts = {"prompt": "blau, größer; \u732b \U0001f600", "seed": "7", "empty": ""}
    found = read(png.write(make_picture(), texts))
    found.load()
    assert found.text == texts


def test_files_are_not_much_larger_than_pillows() -> None:
    image = make_picture(512, 512)
    assert len(png.write(image, {})) < 1.1 * len(encoded(image, compress_level=1))
