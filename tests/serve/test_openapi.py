"""The server does what its OpenAPI document says, whatever it is asked: schemathesis tries."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import requests
import schemathesis
from hypothesis import settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks

from image_worker.errors import ImageUnavailable
from image_worker.job import images
from image_worker.serve import openai_api
from image_worker.serve.http import create_app
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.conftest import make_picture
from tests.serve.served import serving
from tests.waiting import SECONDS
from tests.worker_jobs import as_base64

VARIABLES = {"MODEL": "mini", "API_KEY": "s3cret"}  # with a key, so that `ignored_auth` can try
HEADERS = {"Authorization": "Bearer s3cret"}
PICTURE = as_base64(make_picture(64, 64))

schema = schemathesis.openapi.from_dict(create_app(Mock(), Settings.from_env(VARIABLES)).openapi())
schemathesis.openapi.format("binary", st.just(base64.b64decode(PICTURE)))
load_all_checks()
# What is right by the document may still be refused, by rules that a schema does not tell: a prompt
# has so many tokens, the model takes so many pictures and such sides, no integer is 3.0.
EXCLUDED = [schemathesis.checks.positive_data_acceptance]

# What makes of a right job, by the document, one that this model does, and soon.
POSSIBLE = {"num_inference_steps": 1, "true_cfg_scale": 1, "output_format": "webp"}
JOB = POSSIBLE | {"image": PICTURE, "width": 64, "height": 64, "num_images": 1}
JOB |= dict.fromkeys(("image_url", "image_base64", "images", "loras"))
NO_PICTURE = JOB | {"image": "AAAA"}
FORM = POSSIBLE | {"model": "mini", "size": "64x64", "n": 1}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    def unreachable(*_: object) -> bytes:
        raise ImageUnavailable("tests ask nobody else")

    worker = Worker.from_settings(Settings.from_env(VARIABLES))
    with pytest.MonkeyPatch.context() as patch, serving(worker, **VARIABLES) as found:
        patch.setattr(images, "fetch", unreachable)
        yield found
    worker.close()


@settings(max_examples=10, deadline=None, derandomize=True)
def is_answered_as_documented(case: schemathesis.Case, url: str) -> None:
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE:
        if case.path in ("/run", "/runsync"):
            case.body.pop("s3Config", None)
            # What /run answers does not depend on what becomes of the job.
            case.body["input"].update(JOB if case.path == "/runsync" else NO_PICTURE)
        elif case.path == openai_api.EDITS:
            case.body.update(FORM)
    case.call_and_validate(url, headers=HEADERS, excluded_checks=EXCLUDED, timeout=SECONDS)


# A name for each operation's test: pytest 9.2 gives one id to all that schemathesis makes of one
# name, and of tests with the same id pytest-xdist runs one.
globals().update(
    {
        "test_any_request_" + re.sub(r"\W+", "_", label): schema.include(name=label).parametrize()(
            is_answered_as_documented
        )
        for label in (operation.ok().label for operation in schema.get_all_operations())
    }
)


def test_each_operation_has_an_id(request: pytest.FixtureRequest) -> None:
    ids = [item.nodeid for item in request.session.items]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("given", [JOB, NO_PICTURE])
@pytest.mark.parametrize("route", ["GET /status", "GET /stream", "POST /cancel"])
def test_jobs_are_shown_as_documented(url: str, route: str, given: dict[str, object]) -> None:
    method, path = route.split()
    body = {"input": {"prompt": "make the red circle blue", **given}}
    job = requests.post(f"{url}/run", json=body, headers=HEADERS, timeout=SECONDS).json()
    case = schema[path + "/{job_id}"][method].Case(path_parameters={"job_id": job["id"]})
    assert case.call_and_validate(url, headers=HEADERS, timeout=SECONDS).status_code == 200
