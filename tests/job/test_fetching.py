"""Pictures from URLs: of public addresses only, and never more or longer than allowed."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Sequence

import pytest
from PIL import Image

from image_worker.errors import ImageUnavailable, InvalidImage, WorkerError
from image_worker.job import images
from image_worker.job.request import ImageSource
from tests.conftest import make_picture
from tests.job.hostile_server import HostileServer
from tests.job.internet import PUBLIC, Internet
from tests.job.test_network import PRIVATE
from tests.worker_jobs import as_base64

_Allowance = images.Allowance


def load(sources: Sequence[tuple[str, ImageSource]]) -> list[Image.Image]:
    return images.load_images(sources, Image.Image.copy)


def test_the_bytes_of_a_job_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_base64(make_picture())
    monkeypatch.setattr(
        images, "Allowance", lambda: _Allowance(size=len(base64.b64decode(text)) * 2)
    )
    pair = [(f"images[{number}]", ImageSource(base64=text)) for number in range(2)]
    assert len(load(pair)) == 2
    with pytest.raises(InvalidImage, match="in all"):
        load([*pair, ("images[2]", ImageSource(base64=text))])


def test_addresses_of_this_machine_are_refused(server: str) -> None:
    for url in (server, "http://169.254.169.254/latest", "http://0x7f000001/", "http://[::1]/"):
        with pytest.raises(InvalidImage, match="public address"):
            images.fetch(url)


def test_a_picture_is_fetched(server: str, trusting: None) -> None:
    [found] = load([("image_url", ImageSource(url=f"{server}/picture"))])
    assert found.size == (40, 30)


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("/missing", InvalidImage, "answered 404"),
        ("/busy", ImageUnavailable, "answered 503"),
        ("/endless", InvalidImage, "over 20 MiB"),
        ("/declared", InvalidImage, "over 20 MiB"),
        ("/swollen", InvalidImage, "over 20 MiB"),
        ("/to?file:///etc/passwd", InvalidImage, "not allowed"),
        ("/to?ftp://a.example/x", InvalidImage, "not allowed"),
        ("/to?http://[::1", InvalidImage, "not valid"),
        ("/to?/to?/to?/to?/to?/to?/picture", InvalidImage, "too many"),
    ],
)
def test_a_fetch_that_fails(
    path: str, kind: type[WorkerError], reason: str, server: str, trusting: None
) -> None:
    with pytest.raises(kind, match=reason):
        images.fetch(server + path)


def test_the_bytes_of_a_download_count_too(server: str, trusting: None) -> None:
    with pytest.raises(InvalidImage, match="in all"):
        images.fetch(f"{server}/picture", images.Allowance(size=10))


def test_a_few_redirects_are_followed(server: str, trusting: None) -> None:
    assert images.fetch(server + "/to?/to?/picture") == HostileServer.picture


@pytest.mark.parametrize("address", PRIVATE)
def test_redirects_inside_are_refused(
    address: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    internet = Internet({"a.example": [[PUBLIC]], "b.example": [[address]]})
    internet.port = int(server.rpartition(":")[2])
    internet.install(monkeypatch)
    host = f"[{address}]" if ":" in address else address
    assert images.fetch("http://a.example/picture") == HostileServer.picture
    for target in (host, "b.example"):
        with pytest.raises(InvalidImage, match="public address"):
            images.fetch(f"http://a.example/to?http://{target}/picture")
    assert set(internet.dialled) == {PUBLIC}


def test_the_pictures_of_a_job_share_one_deadline(
    server: str, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "Allowance", lambda: _Allowance(seconds=0.3))
    sources = [
        (f"images[{number}]", ImageSource(url=f"{server}/{path}"))
        for number, path in enumerate(("drip", "headers", "drip", "headers"))
    ]
    start = time.monotonic()
    with pytest.raises(ImageUnavailable) as caught:
        load(sources)
    assert time.monotonic() - start < 2
    assert caught.value.field == "images[0]"


@pytest.mark.parametrize("path", ["drip", "headers"])
def test_a_slow_drip_ends_at_the_deadline(path: str, server: str, trusting: None) -> None:
    before = threading.active_count()
    start = time.monotonic()
    with pytest.raises(ImageUnavailable, match=r"too slow|within"):
        images.fetch(f"{server}/{path}", images.Allowance(seconds=0.3))
    assert time.monotonic() - start < 2
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
