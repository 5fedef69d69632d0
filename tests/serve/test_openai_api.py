"""OpenAI's terms through RunPod's queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from image_worker.serve import openai_api
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import make_picture, mini_model
from tests.worker_jobs import as_base64, job


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(Settings.from_env({}), mini_model())
    yield made
    made.close()


def ask(worker: Worker, fields: Any, route: Any = openai_api.EDITS) -> dict[str, Any]:
    given = {"id": "1", "input": {"openai_route": route, "openai_input": fields}}
    return asyncio.run(openai_api.run(worker, given))


def test_an_edit(worker: Worker) -> None:
    fields = {"prompt": "blur it", "image": as_base64(make_picture()), "n": 2, "seed": 3}
    found = ask(worker, {**fields, "num_inference_steps": 2, "user": "someone"})
    assert len(found["data"]) == 2 and found["seeds"] == [3, 4]
    assert found["size"] == "128x128" and found["output_format"] == "png"


@pytest.mark.parametrize(
    ("fields", "route", "param"),
    [
        ({"prompt": "x"}, "/v1/chat/completions", None),
        ({"prompt": "x"}, None, None),
        ("x", openai_api.EDITS, None),
        ({"prompt": "x", "image": [], "quality": ["high"]}, openai_api.EDITS, "quality"),
        ({"prompt": "x", "image": "AAAA", "stream": True}, openai_api.EDITS, "stream"),
        ({"prompt": "x"}, openai_api.EDITS, "images"),
    ],
)
def test_what_cannot_be_done_is_said(
    worker: Worker, fields: Any, route: Any, param: str | None
) -> None:
    error = ask(worker, fields, route)["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"]


def test_other_jobs_are_what_they_are(worker: Worker) -> None:
    assert "images" in asyncio.run(openai_api.run(worker, job()))
