"""A hub on this machine: one repo, and the faults that a test asks for."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils.sha import git_hash

from image_worker.model import retrying

REPO = "someone/something"
LIST = "the list of files"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What happens to one request instead of the right answer."""

    status: int = 0  # this one, without a body
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int | None = None  # after so many bytes of the body the connection is closed
    stalls: bool = False  # and then not even closed
    wrong: bool = False  # the first byte is another one
    whole: bool = False  # no matter which range was asked for


@dataclass
class Hub:
    """`faults` are used up in order, by path, or `LIST` for the list of files.

    `asked` has the path and the first byte of every request for a file; `tokens` those that came
    with a request, whatever for; a private repo is told of to nobody without one.
    """

    files: dict[str, bytes]
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    private: bool = False
    lists: int = 0
    piece: int = 2**16  # bytes that are sent at a time
    pause: float = 0.0  # seconds between pieces
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.closing = threading.Event()
        self.pieces = 0

    def next_fault(self, name: str) -> Fault:
        with self.lock:
            faults = self.faults.get(name)
            return faults.pop(0) if faults else Fault()

    def listing(self) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
            sibling["blobId"] = git_hash(content)
            if path.endswith(".safetensors"):
                sha = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 130}
            siblings.append(sibling)
        return {"id": REPO, "sha": COMMIT, "siblings": siblings}

    def count_piece(self) -> None:
        with self.lock:
            self.pieces += 1
            self.lock.notify_all()
        if self.pause:
            time.sleep(self.pause)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.tokens |= {token} if token else set()
        if self.hub.private and not token and not path.startswith("/cdn/"):
            return self._head(401, {"X-Error-Code": "RepoNotFound"})
        if path.startswith(f"/api/models/{REPO}/revision/"):
            return self._list()
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):  # as the hub does: elsewhere
            return self._head(302, {"Location": self.path.replace(REPO, "cdn", 1)})
        if not path.startswith(f"/cdn/resolve/{COMMIT}/"):  # the library asks for more now and then
            return self._head(404, {})
        path = path.removeprefix(f"/cdn/resolve/{COMMIT}/")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.hub.asked.append((path, start))
        return self._file(path, start, self.hub.next_fault(path))

    def _list(self) -> None:
        self.hub.lists += 1
        fault = self.hub.next_fault(LIST)
        if fault.status:
            return self._head(fault.status, fault.headers)
        body = json.dumps(self.hub.listing()).encode()
        self._head(200, {"Content-Length": str(len(body))})
        self.wfile.write(body)
        return None

    def _file(self, path: str, start: int, fault: Fault) -> None:
        content = self.hub.files[path]
        if fault.status:
            return self._head(fault.status, fault.headers)
        if fault.wrong:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0 if fault.whole else start
        body, sent = content[start:], content[start:][: fault.after]
        headers = {"Content-Length": str(len(body))}
        if not fault.whole:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(200 if fault.whole else 206, headers)
        for at in range(0, len(sent), self.hub.piece):
            self.wfile.write(sent[at : at + self.hub.piece])
            self.hub.count_piece()
        if fault.stalls:
            self.hub.closing.wait()
        self.close_connection = fault.after is not None
        return None

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serves the hub, as the only one that huggingface_hub knows."""
    with serving(hub):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(retrying, "FIRST_WAIT", 0.01)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # it remembers proxies
        yield hub
        close_session()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, at its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
