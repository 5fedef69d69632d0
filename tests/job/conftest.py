"""Shared by tests of what is fetched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.job.hostile_server import HostileServer
from tests.job.internet import serving


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(HostileServer) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's own switch, so that a server on this machine can stand in for the internet."""
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
