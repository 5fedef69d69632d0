"""The load bench, small: every job is answered once, and rightly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from image_worker.bench import load
from image_worker.bench.load import Case, Outcome


def test_forty_mixed_jobs_are_answered_once_and_rightly(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    arguments = [
        "--jobs",
        "40",
        "--batch-size",
        "4",
        "--side",
        "64",
        "--log",
        str(tmp_path / "log"),
    ]
    monkeypatch.setattr(sys, "argv", ["load", *arguments])
    monkeypatch.setenv("MODEL", "mini")
    assert load.main() == 0, capsys.readouterr().out
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert int(row[1]) == 40 and 0 < int(row[2]) < 10


def test_a_wrong_answer_is_found() -> None:
    given = {"prompt": "x", "seed": 1, "num_inference_steps": 2, "num_images": 1}
    good, bad = Case({"id": "a", "input": given}, None), Case({"id": "b", "input": given}, "x")
    output = given | {"images": ["…"]}
    assert Outcome(good, {"output": output}, 1).fault is None
    assert Outcome(good, {"output": output | {"seed": 2}}, 1).fault
    assert Outcome(good, {"error": '{"type": "internal_error"}'}, 1).fault
    assert Outcome(bad, {"output": output}, 1).fault
    assert Outcome(bad, {"error": '{"type": "x"}'}, 1).fault is None
