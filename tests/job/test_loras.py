"""LoRAs that callers name: the forms, and what is fetched from a URL."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_worker.errors import InvalidLora, LoraUnavailable, WorkerError
from image_worker.job import loras
from image_worker.job.loras import AtUrl, InFolder, OnHub
from tests.job.hostile_server import HostileServer

LIMIT = 10**6


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("a/b:c.safetensors", OnHub("a/b", "c.safetensors", None), "c.safetensors"),
        ("a/b:c/d-1.safetensors@v1", OnHub("a/b", "c/d-1.safetensors", "v1"), "d-1.safetensors"),
        ("a/b:c.safetensors@refs/pr/2", OnHub("a/b", "c.safetensors", "refs/pr/2"), None),
        ("a style (v2).safetensors", InFolder("a style (v2).safetensors"), None),
        ("https://a.example/b%20c.safetensors?key=1", None, "b c.safetensors"),
    ],
)
def test_the_forms_of_a_source(text: str, expected: loras.Source | None, name: str | None) -> None:
    found = loras.parse(text)
    assert found == (expected or AtUrl(text))
    assert name is None or found.name == name


@given(st.text(max_size=60) | st.from_regex(r"[./a:@\\-]{0,20}(\.safetensors)?", fullmatch=True))
def test_no_name_leads_out_of_its_folder(text: str) -> None:
    try:
        found = loras.parse(text)
    except ValueError:
        return
    path = found.url if isinstance(found, AtUrl) else found.name
    assert ".." not in path.split("/")[0][:2] and "\\" not in path
    if isinstance(found, InFolder):
        assert "/" not in text and not text.startswith(".")


@pytest.fixture
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server on this machine can stand in for one with a certificate."""
    monkeypatch.setattr(loras, "_LORA", replace(loras._LORA, schemes=("http://",)))


def test_a_file_is_fetched_whole(
    server: str, trusting: None, plain_http: None, tmp_path: Path
) -> None:
    place = tmp_path / "loras" / "x.safetensors"
    loras.fetch(server + "/to?/to?/picture", place, LIMIT)
    assert place.read_bytes() == HostileServer.picture
    assert [path.name for path in place.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("/missing", InvalidLora, "answered 404"),
        ("/busy", LoraUnavailable, "answered 503"),
        ("/endless", InvalidLora, "over 1 MB"),
        ("/declared", InvalidLora, "over 1 MB"),
        ("/swollen", InvalidLora, "over 1 MB"),
        ("/to?file:///etc/passwd", InvalidLora, "must begin with"),
        ("/to?ftp://a.example/x", InvalidLora, "must begin with"),
        ("/to?http://[::1", InvalidLora, "not valid"),
        ("/to?/to?/to?/to?/to?/to?/picture", InvalidLora, "too many"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(
    path: str,
    kind: type[WorkerError],
    reason: str,
    server: str,
    trusting: None,
    plain_http: None,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=reason):
        loras.fetch(server + path, tmp_path / "x.safetensors", LIMIT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["drip", "headers"])
def test_a_slow_drip_ends_at_the_deadline(
    path: str, server: str, trusting: None, plain_http: None, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(LoraUnavailable, match=r"too slow|within"):
        loras.fetch(f"{server}/{path}", tmp_path / "x.safetensors", LIMIT, seconds=0.3)
    assert time.monotonic() - start < 2


def test_addresses_of_this_machine_and_plain_http_are_refused(
    server: str, monkeypatch: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidLora, match="must begin with https://"):
        loras.fetch(server, tmp_path / "x.safetensors", LIMIT)
    monkeypatch.setattr(loras, "_LORA", replace(loras._LORA, schemes=("http://", "https://")))
    for url in (server, "https://169.254.169.254/latest", "https://[::1]/"):
        with pytest.raises(InvalidLora, match="public address"):
            loras.fetch(url, tmp_path / "x.safetensors", LIMIT)


def test_lightning_is_not_a_jobs_to_choose() -> None:
    with pytest.raises(ValueError, match="schedule of its own"):
        loras.parse("lightx2v/Qwen-Image-Lightning:Qwen-Image-Lightning-4steps-V1.0.safetensors")
