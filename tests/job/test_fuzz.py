"""2,000 random inputs: each works or is refused by name, none hangs, none leaves memory behind."""

from __future__ import annotations

import base64
import gc
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from image_worker.catalog import CATALOG
from image_worker.errors import InternalError, WorkerError
from image_worker.job.images import MAX_PIXELS, decode, decode_base64
from image_worker.job.network import within
from image_worker.job.request import EditRequest, summary
from tests.conftest import make_picture
from tests.job.test_images import profile
from tests.pictures import encoded

REQUESTS = IMAGES = 1000
SECONDS = 10.0  # that no input may take: far above all, far below a hang
SLACK = 96 * 2**20  # bytes that may stay in use: half of it are hypothesis' own


def works(work: Callable[[], object]) -> bool:
    """Whether `work` did; it may fail by a `WorkerError` only, one that can be sent as a reply."""
    try:
        within(SECONDS, work, InternalError("a hang"))
    except InternalError:
        raise
    except WorkerError as error:
        json.dumps(error.reply(), ensure_ascii=False, allow_nan=False).encode()
        return False
    return True


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    assert works(lambda: decode(samples()[0]))  # what is loaded once, is
    gc.collect()
    before = psutil.Process().memory_info().rss
    yield
    gc.collect()
    assert psutil.Process().memory_info().rss - before < SLACK


TEXT = st.characters(exclude_categories=())  # halves of surrogate pairs, too: JSON can hold them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(TEXT)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(TEXT), inner, max_size=5),
    max_leaves=10,
)
PICTURES = st.sampled_from(
    ["aGVsbG8="] * 5 + ["https://a.example/x.png", "file:///etc/passwd", "://", ""]
)
SOURCES = PICTURES | st.fixed_dictionaries({}, optional={"url": PICTURES, "base64": PICTURES})
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(TEXT, min_size=1),
    "negative_prompt": st.text(TEXT),
    "image": PICTURES,
    "images": st.lists(SOURCES, max_size=5),
    "true_cfg_scale": st.floats(1, 20),
    "num_inference_steps": st.integers(0, 101),
    "seed": st.integers(-1, 2**64),
    "width": st.integers(0, 20).map(lambda number: number * 16),
    "height": st.integers(0, 20).map(lambda number: number * 16),
    "num_images": st.integers(1, 4),
    "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    "quality": st.integers(1, 100),
    "reencode": st.booleans(),
    "embed_metadata": st.booleans(),
}
FIELDS = {name: right | right | right | ANYTHING for name, right in RIGHT.items()}
NEEDED = {name: RIGHT[name] for name in ("prompt", "image")}
OTHERS = st.dictionaries(
    st.sampled_from(sorted(EditRequest.model_fields)) | st.text(TEXT), ANYTHING
)
JOBS = st.one_of(
    st.fixed_dictionaries({}, optional=FIELDS),
    st.fixed_dictionaries(
        NEEDED, optional={n: f for n, f in RIGHT.items() if n not in (*NEEDED, "images")}
    ),
    st.builds(lambda some, more: {**some, **more}, st.fixed_dictionaries(FIELDS), OTHERS),
    ANYTHING,
)


def accept(job: object) -> None:
    request = EditRequest.parse(job, CATALOG["mini"])
    assert request.sources and len(request.seeds) == request.num_images
    json.dumps({"prompt": request.prompt, **summary(request)}, ensure_ascii=False).encode()


@settings(
    max_examples=REQUESTS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(JOBS)
def test_requests(job: object) -> None:
    works(lambda: accept(job))


def samples() -> list[bytes]:
    """Files of all formats and many kinds."""
    picture = make_picture(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [make_picture(48, 32, seed) for seed in (1, 2)]
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "PNG", {"exif": exif, "icc_profile": profile()}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.quantize(16), "PNG", {"transparency": 3}),
        (picture, "PNG", {"save_all": True, "append_images": frames}),
        (picture, "JPEG", {"exif": exif, "icc_profile": profile()}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "WEBP", {"exif": exif}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}),
        (picture, "WEBP", {"save_all": True, "append_images": frames}),
        (picture, "GIF", {"save_all": True, "append_images": frames}),
        (picture, "BMP", {}),
        (picture.quantize(16), "BMP", {}),
    ]
    return [encoded(image, form, **options) for image, form, options in kinds]


def mutated(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files, damaged in one of several ways, or in some."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        match rng.choice(("bits", "header", "cut", "join", "repeat", "number")):
            case "bits":
                for _ in range(rng.choice((1, 10, 100))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case "header":
                data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255))
            case "cut":
                data = data[: at + 1]
            case "join":
                data = data[: at + 1] + rng.choice(files)[rng.randrange(64) :]
            case "repeat":
                data[at:at] = data[at : at + rng.randrange(200)] * rng.choice((1, 50))
            case "number":
                data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\0\1"))
    return bytes(data)


def read(data: bytes, prefix: str) -> None:
    text = prefix + base64.b64encode(data).decode()
    assert decode_base64(text) == data
    found = decode(data)
    assert found.mode == "RGB" and found.width * found.height <= MAX_PIXELS


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
def test_pictures() -> None:
    rng = random.Random(0)
    files = samples()
    read_all = 0
    for number in range(IMAGES - 100):
        prefix = ("", "data:image/png;base64,")[number % 2]
        read_all += works(partial(read, mutated(rng, files), prefix))
    assert 100 < read_all < 800, "both outcomes are tried"
    for _ in range(100):
        text = base64.b64encode(rng.choice(files)).decode()
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("", "\n", "=", "é", "\0", ",", "data:")) + text[at + 1 :]
        works(partial(lambda text: decode(decode_base64(text)), text))
