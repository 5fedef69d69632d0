"""A server that answers downloads as one must not: without end, slowly, with lies, with errors."""

from __future__ import annotations

import gzip
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.conftest import make_picture
from tests.pictures import encoded


class HostileServer(BaseHTTPRequestHandler):
    """Most paths are answered with a picture."""

    picture = encoded(make_picture(40, 30))

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/endless":
            self._start()
            self._send(b"x" * 2**20, times=25)
        elif self.path == "/declared":
            self.send_response(200)
            self.send_header("Content-Length", str(21 * 2**20))
            self.end_headers()
        elif self.path == "/busy":
            self.send_error(503)
        elif self.path == "/drip":
            self._start()
            self._send(b"x", times=100, pause=0.05)
        elif self.path == "/headers":
            self._send(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n")
            self._send(b"X-A: b\r\n", times=60, pause=0.05)
        elif self.path == "/swollen":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self._send(gzip.compress(b"\0" * 2**26))
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", unquote(self.path[4:]))
            self.end_headers()
        else:
            self._start()
            self._send(self.picture)

    def _start(self) -> None:
        self.send_response(200)
        self.end_headers()

    def _send(self, data: bytes, times: int = 1, pause: float = 0.0) -> None:
        try:
            for _ in range(times):
                self.wfile.write(data)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            return  # the client has hung up, as it should

    def log_message(self, *_: Any) -> None:
        return
