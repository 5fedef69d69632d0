"""S3 storage, against a stand-in on this machine."""

from __future__ import annotations

import datetime
import io
import logging
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore import auth
from PIL import Image
from pydantic import SecretStr

from image_worker.errors import (
    InvalidRequest,
    InvalidSettings,
    StorageUnavailable,
    WorkerError,
)
from image_worker.job import storage as module
from image_worker.job.response import Outlet, make_reply
from image_worker.job.storage import Storage, bucket_url
from image_worker.settings import Settings
from tests.conftest import make_picture
from tests.job.internet import PUBLIC, Internet, serving
from tests.job.test_response import FACTS, request

SECRET = "hush-hush"
ENV = {
    "BUCKET_ENDPOINT_URL": "https://s3.eu-west-1.amazonaws.com",
    "BUCKET_ACCESS_KEY_ID": "me",
    "BUCKET_SECRET_ACCESS_KEY": SECRET,
    "BUCKET_NAME": "pictures",
}
CONFIG = {
    "endpointUrl": "https://s3.example.com",
    "accessId": "me",
    "accessSecret": SECRET,
    "bucketName": "pictures",
}


class _Bucket(BaseHTTPRequestHandler):
    """Keeps what is put; `statuses` are answered in turn, the last one from then on."""

    stored: ClassVar[dict[str, tuple[bytes, dict[str, str]]]] = {}
    statuses: ClassVar[list[int]] = [200]
    pause: ClassVar[float] = 0.0

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.pause)
        statuses = type(self).statuses
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if status == 200:
            self.stored[self.path] = (body, dict(self.headers))
        self.send_response(status)
        if status == 301:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def port() -> Iterator[int]:
    _Bucket.stored, _Bucket.statuses, _Bucket.pause = {}, [200], 0.0
    with serving(_Bucket) as found:
        yield found


@pytest.fixture
def operators(port: int) -> Storage:
    env = ENV | {"BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    found = Storage.from_settings(Settings.from_env(env))
    assert found
    return found


@pytest.fixture
def callers(port: int, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """At a public address; plain http, because the stand-in has no certificate."""
    Internet({"s3.example.com": [[PUBLIC]]}, port).install(monkeypatch)
    found = Storage.from_job(CONFIG, 600)
    return Storage(
        found.base.replace("https:", "http:"), found.access_key, found.secret_key, 600, public=True
    )


def test_a_reply_with_links(operators: Storage) -> None:
    pictures = [make_picture(seed=number) for number in (1, 2)]
    outlet = Outlet("../job 1", operators, max_bytes=100)
    reply = make_reply(pictures, request(num_images=2, output_format="webp"), FACTS, outlet)
    assert reply["output_image_url"] == reply["image_urls"][0]
    assert not {"images", "output_image_base64"} & set(reply)
    assert reply["output_format"] == "webp" and reply["warnings"] == ["one"]
    assert len(_Bucket.stored) == 2
    for url in reply["image_urls"]:
        parts = urlsplit(url)
        body, headers = _Bucket.stored[parts.path]
        assert parts.path.startswith("/pictures/___job_1/") and parts.path.endswith(".webp")
        assert Image.open(io.BytesIO(body)).size == (128, 128)
        assert headers["Content-Type"] == "image/webp"
        assert "Credential=me/" in headers["Authorization"]
        query = parse_qs(parts.query)
        assert query["X-Amz-Expires"] == ["604800"] and len(query["X-Amz-Signature"][0]) == 64
        assert SECRET not in url + str(headers)


def test_signatures_are_those_of_the_published_example() -> None:
    """AWS' documentation of presigned URLs has one with all that goes into it."""
    example = Storage(
        "https://examplebucket.s3.amazonaws.com",
        SecretStr("AKIAIOSFODNN7EXAMPLE"),
        SecretStr("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        86_400,
        public=False,
    )
    moment = datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "get_current_datetime", lambda: moment)
        url = example._link("https://examplebucket.s3.amazonaws.com/test.txt")
    assert url.endswith("aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")


@pytest.mark.parametrize("statuses", [[503, 200], [500, 429, 200]])
def test_a_storage_that_stumbles(statuses: list[int], operators: Storage) -> None:
    _Bucket.statuses = statuses
    [url] = operators.put("job", [b"data"], "png")
    assert _Bucket.stored[urlsplit(url).path][0] == b"data"


@pytest.mark.parametrize("status", [301, 403, 404, 503])
def test_an_upload_that_fails(status: int, operators: Storage) -> None:
    _Bucket.statuses = [status]
    with pytest.raises(StorageUnavailable, match=str(status)) as caught:
        operators.put("job", [b"data"], "png")
    assert caught.value.retryable and not _Bucket.stored


def test_a_storage_that_is_not_there(operators: Storage) -> None:
    gone = Storage("http://127.0.0.1:1/b", SecretStr("a"), SecretStr("b"), 60, public=False)
    with pytest.raises(StorageUnavailable, match="does not answer"):
        gone.put("job", [b"data"], "png")


def test_a_slow_upload_ends(operators: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    _Bucket.pause = 1.0
    monkeypatch.setattr(module, "UPLOAD_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"over 0\.2 seconds"):
        operators.put("job", [b"data"], "png")
    assert time.monotonic() - start < 1.0


def test_a_callers_storage(callers: Storage) -> None:
    [url] = callers.put("job", [b"data"], "png")
    assert url.startswith("http://s3.example.com/pictures/job/")
    assert _Bucket.stored[urlsplit(url).path][1]["Host"] == "s3.example.com"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, InvalidRequest),
        (403, InvalidRequest),
        (404, InvalidRequest),
        (429, StorageUnavailable),
        (503, StorageUnavailable),
    ],
)
def test_a_callers_storage_that_refuses(
    status: int, kind: type[WorkerError], callers: Storage
) -> None:
    _Bucket.statuses = [status]
    with pytest.raises(kind, match=str(status)):
        callers.put("job", [b"data"], "png")


def test_a_callers_storage_that_moves_inside(
    callers: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    internet = Internet({"s3.example.com": [["10.0.0.1"]]})
    internet.install(monkeypatch)
    with pytest.raises(StorageUnavailable):
        callers.put("job", [b"data"], "png")
    assert internet.dialled == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"endpointUrl": None}, "s3Config.endpointUrl"),
        ({"endpointUrl": 5}, "s3Config.endpointUrl"),
        ({"endpointUrl": "s3.example.com"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "http://s3.example.com"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "ftp://s3.example.com"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://me:you@s3.example.com"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://s3.example.com?x=1"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://s3.example.com\n"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://s3.example.com:99999"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://127.0.0.1:9000"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://[::1]"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://169.254.169.254"}, "s3Config.endpointUrl"),
        ({"endpointUrl": "https://inside.example.com"}, "s3Config.endpointUrl"),
        ({"bucketName": "../x"}, "s3Config.endpointUrl"),
        ({"bucketName": 5}, "s3Config.bucketName"),
        ({"accessId": ""}, "s3Config.accessId"),
        ({"accessId": "ü"}, "s3Config.accessId"),
        ({"accessSecret": 5}, "s3Config.accessSecret"),
        ({"accessSecret": "a\nb: c"}, "s3Config.accessSecret"),
    ],
)
def test_an_s3_config_that_is_wrong(
    change: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"s3.example.com": [[PUBLIC]], "inside.example.com": [["10.0.0.1"]]}
    Internet(names).install(monkeypatch)
    given = {name: value for name, value in (CONFIG | change).items() if value is not None}
    with pytest.raises(InvalidRequest) as caught:
        Outlet.of(Settings.from_env(ENV), given, "job")
    assert caught.value.field == field
    assert SECRET not in str(caught.value.reply()) and "you" not in caught.value.message.split()


@pytest.mark.parametrize("config", ["x", 3, [], True])
def test_an_s3_config_that_is_no_object(config: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Outlet.of(Settings.from_env({}), config, "job")
    assert str(caught.value.field).startswith("s3Config")


def test_the_callers_bucket_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Internet({"s3.example.com": [[PUBLIC]]}).install(monkeypatch)
    settings = Settings.from_env(ENV | {"BUCKET_LINK_SECONDS": "60"})
    ours, theirs = Outlet.of(settings, None, "a").storage, Outlet.of(settings, CONFIG, "a").storage
    assert ours and ours.base == "https://s3.eu-west-1.amazonaws.com/pictures" and not ours.public
    assert theirs and theirs.base == "https://s3.example.com/pictures" and theirs.public
    assert theirs.link_seconds == 60


@pytest.mark.parametrize(
    ("endpoint", "bucket", "base"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "b-1", "https://s3.eu-west-1.amazonaws.com/b-1"),
        ("https://x.r2.cloudflarestorage.com/", "b-1", "https://x.r2.cloudflarestorage.com/b-1"),
        ("https://x.r2.cloudflarestorage.com/b-1", None, "https://x.r2.cloudflarestorage.com/b-1"),
        ("https://x.r2.cloudflarestorage.com/b-1", "b-1", "https://x.r2.cloudflarestorage.com/b-1"),
        ("https://b-1.s3.amazonaws.com", None, "https://b-1.s3.amazonaws.com"),
        ("https://b-1.s3.amazonaws.com", "b-1", "https://b-1.s3.amazonaws.com"),
        (
            "https://b-1.ams3.digitaloceanspaces.com",
            None,
            "https://b-1.ams3.digitaloceanspaces.com",
        ),
        ("https://a.example/storage/v1/s3", "b-1", "https://a.example/storage/v1/s3/b-1"),
        ("http://[fd00::1]:9000", "b-1", "http://[fd00::1]:9000/b-1"),
    ],
)
def test_where_the_buckets_name_may_be(endpoint: str, bucket: str | None, base: str) -> None:
    assert bucket_url(endpoint, bucket) == base


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ("b.s3.us-east-2.amazonaws.com", "us-east-2"),
        ("s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1"),
        ("s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("s3.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("b.s3.amazonaws.com", "us-east-1"),
        ("ams3.digitaloceanspaces.com", "ams3"),
        ("x.r2.cloudflarestorage.com", "us-east-1"),
        ("127.0.0.1", "us-east-1"),
    ],
)
def test_the_region_is_in_the_host(host: str, region: str) -> None:
    found = Storage(f"https://{host}/b", SecretStr("a"), SecretStr("b"), 60, public=False)
    assert found._region == region


@pytest.mark.parametrize(
    "missing", ["BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"]
)
def test_half_a_bucket_is_refused(missing: str) -> None:
    with pytest.raises(InvalidSettings, match=missing) as caught:
        Settings.from_env(ENV | {missing: ""})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"BUCKET_NAME": ""}, "name"),
        ({"BUCKET_NAME": "a/b"}, "name"),
        ({"BUCKET_ENDPOINT_URL": "s3"}, "https://"),
        ({"BUCKET_ENDPOINT_URL": f"https://me:{SECRET}@s3.example.com"}, "https://"),
    ],
)
def test_a_bucket_that_cannot_be(change: dict[str, str], reason: str) -> None:
    with pytest.raises(InvalidSettings, match=reason) as caught:
        Storage.from_settings(Settings.from_env(ENV | change))
    assert SECRET not in str(caught.value)


def test_a_bucket_name_alone_and_a_long_life_are_refused() -> None:
    for env in ({"BUCKET_NAME": "b-1"}, ENV | {"BUCKET_LINK_SECONDS": "604801"}):
        with pytest.raises(InvalidSettings, match="BUCKET_"):
            Settings.from_env(env)


def test_the_secret_stays_secret(operators: Storage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _Bucket.statuses = [403]
    with pytest.raises(StorageUnavailable):
        operators.put("job", [b"data"], "png")
    shown = (
        caplog.text + repr(operators) + repr(Settings.from_env(ENV)) + repr(Outlet("j", operators))
    )
    assert SECRET not in shown
