"""Which addresses a caller may send the worker to, and for how long."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import requests
from runpod.serverless.utils.rp_ssrf import SSRFError

from image_worker.errors import ImageUnavailable
from image_worker.job import network
from tests.job.internet import PUBLIC, Internet, serving

LATE = ImageUnavailable("late")

PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.8",
    "192.88.99.1",
    "0.0.0.0",
    "::1",
    "fd00::1",
    "fe80::1",
    "fec0::1",
    "3fff::1",
    "::ffff:10.0.0.1",  # mapped
    "::ffff:192.88.99.1",
    "::10.0.0.1",  # compatible
    "::ffff:0:10.0.0.1",  # translated
    "2002:a00:1::1",  # 6to4 of 10.0.0.1
    "2001:0:4136:e378:8000:63bf:f5ff:fffe",  # Teredo of 10.0.0.1
    "64:ff9b::a00:1",  # NAT64 of 10.0.0.1
    "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(SSRFError):
        network.public_addresses(f"http://{host}/x.png")
    Internet({"a.example": [[PUBLIC, address]]}).install(monkeypatch)
    with pytest.raises(SSRFError):
        network.public_addresses("http://a.example/x.png")


def test_addresses_that_are_allowed() -> None:
    for address in (PUBLIC, "2606:2800:220:1::1", "::ffff:93.184.216.34"):
        host = f"[{address}]" if ":" in address else address
        assert network.public_addresses(f"https://{host}:8443/") == [address]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://a/", "//a/", "http://", "x"])
def test_what_is_no_url_of_the_web(url: str) -> None:
    with pytest.raises(SSRFError):
        network.public_addresses(url)


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(self.headers).encode())

    def log_message(self, *_: Any) -> None:
        return


def test_a_name_that_changes_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked as public, private a moment later: the connection goes where the check looked."""
    with serving(_Hello) as port:
        internet = Internet({"a.example": [[PUBLIC], ["127.0.0.1"]]}, port)
        internet.install(monkeypatch)
        with network.request("GET", "http://a.example/", timeout=5) as response:
            assert "Host: a.example" in response.text
        assert internet.dialled == [PUBLIC]
        with pytest.raises(SSRFError), network.request("GET", "http://a.example/", timeout=5):
            pass
        assert internet.dialled == [PUBLIC]


def test_an_address_without_a_route_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(_Hello) as port:
        internet = Internet({"a.example": [["2606:2800:220:1::1", PUBLIC]]}, port)
        internet.install(monkeypatch)
        with network.request("GET", "http://a.example/", timeout=5) as response:
            assert response.status_code == 200
        assert internet.dialled[-1] == PUBLIC and len(internet.dialled) == 2
    internet.names = {"a.example": [["2606:2800:220:1::1"]]}
    with (
        pytest.raises(requests.ConnectionError),
        network.request("GET", "http://a.example/", timeout=5),
    ):
        pass


def test_no_proxy_and_no_password_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "netrc").write_text("machine a.example login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving(_Hello) as port:
        Internet({"a.example": [[PUBLIC]]}, port).install(monkeypatch)
        with network.request("GET", "http://a.example/", timeout=5) as response:
            assert "Authorization" not in response.text


def test_a_result_in_time_and_an_error_in_time() -> None:
    assert network.within(5, lambda: 3, LATE) == 3
    with pytest.raises(ZeroDivisionError):
        network.within(5, lambda: 1 / 0, LATE)


def test_what_comes_late_is_not_waited_for() -> None:
    release = threading.Event()
    start = time.monotonic()
    with pytest.raises(ImageUnavailable, match="late"):
        network.within(0.1, release.wait, LATE)
    assert time.monotonic() - start < 5
    release.set()


def test_what_is_left_behind_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_SLOTS", threading.BoundedSemaphore(2))
    release, before = threading.Event(), threading.active_count()
    for _ in range(4):
        with pytest.raises(ImageUnavailable):
            network.within(0.05, release.wait, LATE)
    assert threading.active_count() <= before + 2
    release.set()
    assert network.within(5, lambda: 3, LATE) == 3


def test_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(SSRFError) as caught:
        network.public_addresses("http://a.example/")
    assert isinstance(caught.value.__cause__, OSError)
