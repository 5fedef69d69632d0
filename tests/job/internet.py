"""A small internet on this machine: names with public addresses, which one local server answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from urllib3.util import connection

PUBLIC = "93.184.216.34"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server on the loopback address; its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class Internet:
    """`names` are a host's addresses, one list per lookup, the last for all later ones.

    Connections to `PUBLIC` arrive at the local port `port`; all others fail. `dialled` has both.
    """

    def __init__(self, names: dict[str, list[list[str]]], port: int = 9) -> None:
        self.names = names
        self.port = port
        self.dialled: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of name resolution and of urllib3's connections."""
        dial = connection.create_connection

        def resolve(host: str, port: int, *rest: Any, **options: Any) -> list[Any]:
            lookups = self.names.get(host, [[host]])
            addresses = lookups.pop(0) if len(lookups) > 1 else lookups[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

        def create(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
            self.dialled.append(address[0])
            if address[0] != PUBLIC:
                raise OSError("unreachable")
            with monkeypatch.context() as real:
                real.setattr(socket, "getaddrinfo", stock)
                return dial(("127.0.0.1", self.port), *rest, **options)

        stock = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(connection, "create_connection", create)
