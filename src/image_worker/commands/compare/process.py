"""A way's process, as `compare` sees it: asked, answered, and ended with its parent."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from image_worker.commands.compare.ways import ALWAYS
from image_worker.settings import environment

_PATIENCE = 5.0  # seconds that a process has to end when it is told to


class WayFailed(Exception):
    """A way cannot be measured. type: of the worker's errors, or `process_ended`."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type, self.message = type, message


class Process:
    """A process that answers orders (`child.py`)."""

    def __init__(self, variables: Mapping[str, str], log: Path) -> None:
        """variables: on top of this process's environment; log: gets what it logs."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self.begun = time.time()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "image_worker.commands.compare.child"],
                env=environment({**ALWAYS, **variables}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children itself
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order.

        Raises:
            WayFailed: it is an error, or the process has ended.
        """
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WayFailed("process_ended", self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WayFailed(answer["error"]["type"], answer["error"]["message"])
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        with self._log.open(errors="replace") as stream:
            last = "".join(deque(stream, 1)).strip()
        killed = ", killed, as where the host's memory runs out" if status == -9 else ""
        return f"exit status {status}{killed}; its last line: {last or 'none'}"
