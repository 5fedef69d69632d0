"""Replies: always JSON, never over the limit, with files that say how they were made."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from image_worker.catalog import CATALOG
from image_worker.errors import InvalidRequest, InvalidSettings, ReplyTooLarge
from image_worker.job.request import MAX_SEED, EditRequest
from image_worker.job.response import Outlet, make_reply
from image_worker.settings import Settings
from tests.conftest import make_picture

PROMPT = "mach den Kreis blau, bitte: 把圆变成蓝色 🎨"
FACTS: dict[str, Any] = {
    "prompt": PROMPT,
    "num_inference_steps": 8,
    "true_cfg_scale": 1.0,
    "model": "mini",
    "output_format": "png",
    "warnings": ["one"],
}
PLAIN = Outlet("job")


def request(**options: Any) -> EditRequest:
    given = {"prompt": PROMPT, "image": "aGVsbG8=", "seed": 7, **options}
    return EditRequest.parse(given, CATALOG["edit-2509"])


def noise(side: int = 256) -> Image.Image:
    """A picture that no format makes much smaller."""
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def written(image: Image.Image) -> dict[str, str]:
    """What is told by the file that a picture was read from."""
    if image.format == "PNG":
        return {str(name): str(text) for name, text in image.text.items()}  # type: ignore[attr-defined]
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return {}
    assert comment.startswith(b"UNICODE\0")
    found: dict[str, str] = json.loads(comment[8:].decode("utf-16-le"))
    return found


def size(reply: dict[str, Any]) -> int:
    return len(json.dumps(reply, allow_nan=False))


def test_the_pictures_and_the_facts() -> None:
    picture = make_picture()
    reply = make_reply([picture], request(), FACTS, PLAIN)
    assert np.array_equal(opened(reply["images"][0]), picture)
    assert reply["output_image_base64"] == reply["images"][0]
    assert FACTS.items() <= reply.items()
    assert reply["warnings"] is not FACTS["warnings"]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_each_file_says_how_it_was_made(form: str) -> None:
    asked = request(output_format=form, num_images=2, seed=MAX_SEED, negative_prompt="hässlich")
    reply = make_reply([make_picture()] * 2, asked, FACTS, PLAIN)
    for text, seed in zip(reply["images"], (MAX_SEED, 0), strict=True):
        assert opened(text).format == form.upper()
        assert written(opened(text)) == {
            "prompt": PROMPT,
            "negative_prompt": "hässlich",
            "model": "mini",
            "num_inference_steps": "8",
            "true_cfg_scale": "1.0",
            "seed": str(seed),
        }


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    ("preset", "asked", "expected"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
def test_files_need_not_say_anything(
    form: str, preset: bool, asked: bool | None, expected: bool
) -> None:
    outlet = Outlet("job", embed_metadata=preset)
    given = request(output_format=form, embed_metadata=asked)
    reply = make_reply([make_picture()], given, FACTS, outlet)
    assert bool(written(opened(reply["images"][0]))) is expected
    assert (PROMPT.encode() in base64.b64decode(reply["images"][0])) is (expected and form == "png")
    assert bool(opened(reply["images"][0]).getexif()) is (expected and form != "png")


def test_a_prompt_too_long_for_exif_is_cut_there() -> None:
    for letter in ("x", "\x01", "🎨"):
        given = request(prompt=letter * 20_000, negative_prompt=letter * 20_000)
        for form in ("jpeg", "webp"):
            asked = given.model_copy(update={"output_format": form})
            reply = make_reply([make_picture()], asked, FACTS, PLAIN)
            found = written(opened(reply["images"][0]))
            assert given.prompt.startswith(found["prompt"])
            assert len(found["prompt"]) in (2000, 20_000)
            assert found["seed"] == "7"


def test_the_double_is_left_out_first() -> None:
    pictures = [noise(), noise()]
    roomy = make_reply(pictures, request(num_images=2), FACTS, PLAIN)
    limit = size(roomy) - 100
    reply = make_reply(pictures, request(num_images=2), FACTS, Outlet("job", max_bytes=limit))
    assert "output_image_base64" not in reply
    assert reply["images"] == roomy["images"]
    assert reply["warnings"][0] == "one" and "images[0]" in reply["warnings"][1]
    assert FACTS["warnings"] == ["one"]


def test_what_does_not_fit_is_an_error_that_says_what_helps() -> None:
    with pytest.raises(ReplyTooLarge) as caught:
        make_reply([noise()], request(), FACTS, Outlet("job", max_bytes=100_000))
    assert not caught.value.retryable
    for word in ("0.3 MB", "0.1", "jpeg", "webp", "reencode", "num_images", "width", "S3"):
        assert word in caught.value.message


@pytest.mark.parametrize("asked", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("limit", [180_000, 120_000, 60_000])
def test_encoding_anew_where_that_is_allowed(asked: str, limit: int) -> None:
    given = request(output_format=asked, reencode=True)
    reply = make_reply([noise()], given, FACTS, Outlet("job", max_bytes=limit))
    assert size(reply) <= limit
    form = reply["output_format"]
    assert opened(reply["images"][0]).format == form.upper()
    if form != asked:
        assert any(f"as {asked}" in text and form in text for text in reply["warnings"])
    assert written(opened(reply["images"][0]))["seed"] == "7"


def test_even_encoding_anew_has_an_end() -> None:
    with pytest.raises(ReplyTooLarge):
        make_reply([noise()], request(reencode=True), FACTS, Outlet("job", max_bytes=5000))


def test_no_limit() -> None:
    reply = make_reply([noise(1024)] * 4, request(num_images=4), FACTS, PLAIN)
    assert size(reply) > 15e6 and len(reply["images"]) == 4


def test_what_is_not_json_is_no_reply() -> None:
    for outlet in (PLAIN, Outlet("job", max_bytes=10**7)):
        with pytest.raises(ValueError, match="JSON"):
            make_reply([make_picture()], request(), FACTS | {"loss": float("nan")}, outlet)


def test_one_picture_per_seed() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_reply([make_picture()], request(num_images=2), FACTS, PLAIN)


def test_an_outlet_from_the_settings() -> None:
    outlet = Outlet.of(Settings.from_env({}), None, "job")
    assert outlet == Outlet("job", None, 10_000_000, True)
    given = {"MAX_REPLY_MB": "0", "EMBED_METADATA": "0"}
    assert Outlet.of(Settings.from_env(given), {}, "job") == Outlet("job", None, None, False)


def test_bad_settings_and_fields() -> None:
    with pytest.raises(InvalidSettings, match="MAX_REPLY_MB"):
        Settings.from_env({"MAX_REPLY_MB": "-1"})
    for wrong in ({"reencode": 1}, {"reencode": "true"}, {"embed_metadata": "no"}):
        with pytest.raises(InvalidRequest, match="boolean"):
            request(**wrong)
