"""What callers may ask for, and how what they may not ask for is named."""

from __future__ import annotations

from typing import Any

import pytest

from image_worker.catalog import CATALOG
from image_worker.errors import InvalidRequest
from image_worker.job.request import MAX_SEED, EditRequest, summary

EDIT, IMAGE = CATALOG["edit-2509"], CATALOG["image"]
GOOD: dict[str, Any] = {"prompt": "blur it", "image": "aGVsbG8="}


def refused(job_input: Any, entry: Any = EDIT) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        EditRequest.parse(job_input, entry)
    return caught.value


def test_the_least_that_a_job_needs() -> None:
    request = EditRequest.parse(GOOD, EDIT)
    assert request.num_images == 1
    assert request.output_format == "png"
    assert 0 <= request.seed <= MAX_SEED
    assert request.seed != EditRequest.parse(GOOD, EDIT).seed


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({"image": "https://a.example/x.png"}, ["url"]),
        ({"image": "aGVsbG8="}, ["base64"]),
        ({"image": "data:image/png;base64,aGVsbG8="}, ["base64"]),
        ({"image_url": "http://a.example/x"}, ["url"]),
        ({"image_base64": "aGVsbG8="}, ["base64"]),
        ({"images": ["aGVsbG8=", "http://a.example/x"]}, ["base64", "url"]),
        ({"images": [{"url": "http://a.example/x"}, {"base64": "aGVsbG8="}]}, ["url", "base64"]),
    ],
)
def test_every_way_to_give_pictures(given: dict[str, Any], kinds: list[str]) -> None:
    request = EditRequest.parse({"prompt": "x", **given}, EDIT)
    assert ["url" if source.url else "base64" for _, source in request.sources] == kinds


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "  \n"}, "prompt", "pattern"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": ["a"]}, "prompt", "string"),
        ({"prompt": "x" * 20_001}, "prompt", "20000"),
        ({"steps": 4}, "steps", "no such field"),
        ({"num_inference_steps": True}, "num_inference_steps", "integer"),
        ({"num_inference_steps": 4.0}, "num_inference_steps", "integer"),
        ({"num_inference_steps": "4"}, "num_inference_steps", "integer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater"),
        ({"num_inference_steps": 101}, "num_inference_steps", "less"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale", "finite"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale", "finite"),
        ({"true_cfg_scale": True}, "true_cfg_scale", "number"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale", "greater"),
        ({"true_cfg_scale": 21}, "true_cfg_scale", "less"),
        ({"seed": -1}, "seed", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"width": 1000}, "width", "multiple of 16"),
        ({"width": 240}, "width", "256 to 2048"),
        ({"height": 2064}, "height", "256 to 2048"),
        ({"num_images": 5}, "num_images", "less"),
        ({"output_format": "gif"}, "output_format", "png"),
        ({"output_format": "jpeg", "quality": 0}, "quality", "greater"),
        ({"image": 5}, "image", "string"),
        ({"image_url": "file:///etc/passwd", "image": None}, "image_url", "http"),
        ({"image": "file:///etc/passwd"}, "image", "http"),
        ({"image": "gopher://a.example"}, "image", "http"),
        ({"image": None, "images": ["aGVsbG8=", "file:///x"]}, "images[1]", "http"),
        ({"image": None, "images": [{"url": 5}]}, "images[0].url", "string"),
        ({"image": None, "images": [5]}, "images[0]", "ImageSource"),
        ({"width": 16 * 10**4000}, "width", "65536"),
        ({"": 1}, '""', "no such field"),
        ({"str": 1}, "str", "no such field"),
        ({"image": None}, "image", "give image"),
        ({"image": None, "images": []}, "images", "at least 1"),
        ({"image": None, "images": ["a"] * 5}, "images", "at most 4"),
        ({"image": None, "images": [{"url": "ftp://x"}]}, "images[0]", "http"),
        ({"image": None, "images": [{"path": "x"}]}, "images[0]", "no such field"),
        ({"image": None, "images": [{}]}, "images[0]", "exactly one"),
        ({"image": None, "images": "aGVsbG8="}, "images", "list"),
        ({"image_url": "http://a.example"}, None, "image and image_url"),
        ({"quality": 80}, None, "png"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], field: str | None, reason: str) -> None:
    given = GOOD | change
    if given["image"] is None:
        del given["image"]
    error = refused(given)
    assert reason in error.message
    if field is not None:
        assert str(error.field).startswith(field)
        assert "[_exactly_one" not in error.message and len(error.message) <= 2000
        assert error.reply()["field"] == error.field


@pytest.mark.parametrize("job_input", [None, 3, "prompt", [], ["prompt"], True])
def test_the_input_must_be_an_object(job_input: Any) -> None:
    assert refused(job_input).field == "input"


def test_all_faults_are_named_at_once() -> None:
    message = refused({"image": "x", "sed": 1, "width": 7}).message
    assert all(name in message for name in ("prompt", "sed", "width"))


def test_text_to_image_takes_no_picture() -> None:
    assert EditRequest.parse({"prompt": "a star"}, IMAGE).sources == []
    assert refused(GOOD, IMAGE).field == "image"


def test_the_first_edit_model_takes_one() -> None:
    error = refused({"prompt": "x", "images": ["aGVsbG8="] * 2}, CATALOG["edit"])
    assert error.field == "images"
    assert "at most 1" in error.message


def test_each_picture_has_its_seed() -> None:
    assert EditRequest.parse(GOOD | {"seed": 5, "num_images": 3}, EDIT).seeds == [5, 6, 7]
    assert EditRequest.parse(GOOD | {"seed": MAX_SEED, "num_images": 2}, EDIT).seeds == [
        MAX_SEED,
        0,
    ]


def test_the_log_holds_no_prompt_and_no_picture() -> None:
    given = GOOD | {"seed": 5, "negative_prompt": "ugly"}
    text = str(summary(EditRequest.parse(given, EDIT)))
    assert "blur" not in text and "ugly" not in text and "aGVsbG8" not in text
    assert "'seed': 5" in text
