"""`CHECKPOINT` at a URL: fetched once, continued where it was cut off, over https only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from image_worker.errors import ModelUnavailable
from image_worker.model import from_url, retrying
from image_worker.settings import Settings

CONTENT = bytes(range(256)) * 40
URL = "https://files.example/folder/model.gguf?token=1"
Answer = Callable[[httpx2.Request], httpx2.Response]


class Cut(httpx2.SyncByteStream):
    """Bytes, and then the connection ends."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Any:
        yield self._content
        raise httpx2.ReadError("cut")


@pytest.fixture
def serve(monkeypatch: Any) -> Callable[..., list[httpx2.Request]]:
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.01)
    client = httpx2.Client

    def serving(*answers: Answer) -> list[httpx2.Request]:
        asked: list[httpx2.Request] = []

        def handle(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return answers[min(len(asked), len(answers)) - 1](request)

        transport = httpx2.MockTransport(handle)
        monkeypatch.setattr(
            httpx2, "Client", lambda **options: client(**options, transport=transport)
        )
        return asked

    return serving


def ranged(request: httpx2.Request) -> httpx2.Response:
    start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
    return httpx2.Response(206 if start else 200, content=CONTENT[start:])


def settings(folder: Path, **more: Any) -> Settings:
    return Settings(model_dir=folder, checkpoint=URL, **more)


def test_it_is_fetched_once(serve: Any, tmp_path: Path) -> None:
    asked = serve(ranged)
    path = from_url.find_checkpoint(settings(tmp_path))
    assert path.name == "model.gguf" and path.read_bytes() == CONTENT
    assert from_url.find_checkpoint(settings(tmp_path, local_only=True)) == path
    assert len(asked) == 1


def test_it_goes_on_where_it_was_cut_off(serve: Any, tmp_path: Path) -> None:
    asked = serve(lambda _: httpx2.Response(200, stream=Cut(CONTENT[:5000])), ranged)
    assert from_url.find_checkpoint(settings(tmp_path)).read_bytes() == CONTENT
    assert [request.headers["Range"] for request in asked] == ["bytes=0-", "bytes=5000-"]


def test_a_server_that_cannot_go_on_begins_again(serve: Any, tmp_path: Path) -> None:
    serve(
        lambda _: httpx2.Response(200, stream=Cut(CONTENT[:5000])),
        lambda _: httpx2.Response(200, content=CONTENT),
    )
    assert from_url.find_checkpoint(settings(tmp_path)).read_bytes() == CONTENT


def test_trouble_passes(serve: Any, tmp_path: Path) -> None:
    serve(lambda _: httpx2.Response(503), ranged)
    assert from_url.find_checkpoint(settings(tmp_path)).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_is_said_at_once(status: int, serve: Any, tmp_path: Path) -> None:
    asked = serve(lambda _: httpx2.Response(status))
    with pytest.raises(ModelUnavailable, match=f"model.gguf .* HTTP {status}; check its address"):
        from_url.find_checkpoint(settings(tmp_path))
    assert len(asked) == 1


def test_it_is_not_led_away_from_https(serve: Any, tmp_path: Path) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme == "https":
            return httpx2.Response(302, headers={"Location": "http://files.example/model.gguf"})
        return ranged(request)

    serve(answer)
    with pytest.raises(ModelUnavailable, match="is not sent over https"):
        from_url.find_checkpoint(settings(tmp_path))


def test_without_downloads_it_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="LOCAL_ONLY=1 forbids"):
        from_url.find_checkpoint(settings(tmp_path, local_only=True))
