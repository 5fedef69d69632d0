"""What is said of downloads while they go on."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from image_worker.model.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines(caplog: Any) -> None:
    sizes = {"a": 3_000_000_000, "b": 1_000_000_000}
    with caplog.at_level(logging.INFO), Progress("both", sizes, {"a": 0, "b": 0}) as progress:
        progress.at("a", 2_000_000_000)
        progress.at("b", 500_000_000)
        progress.at("b", 250_000_000)  # begun anew
        progress.tell()
    assert "both: 2.25 of 4.00 GB" in caplog.text


def test_a_terminal_gets_one_bar(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO), Progress("both", {"a": 1000}, {"a": 500}) as progress:
        progress.at("a", 1000)
        progress.tell()
    assert "both: 100%" in terminal.getvalue()
    assert "GB/s" not in caplog.text
