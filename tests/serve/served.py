"""The standalone server for tests, over real HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from image_worker.serve.http import create_app
from image_worker.settings import Settings
from image_worker.worker import Worker
from tests.waiting import eventually


@contextmanager
def serving(worker: Worker, **variables: str) -> Iterator[str]:
    """The server in a thread; its URL."""
    settings = Settings.from_env({"STANDALONE_MODE": "1", **variables})
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(worker, settings), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        eventually(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
