"""JSON in pieces is the JSON that it was."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_worker.serve import large_json

CHARACTERS = st.sampled_from('a"\\/é\n😀\u2028')
TEXTS = st.text(CHARACTERS, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "LONG", 9)
    monkeypatch.setattr(large_json, "_PIECE", 7)


@pytest.mark.usefixtures("small")
def test_any_value_is_read() -> None:
    @given(VALUES, st.booleans())
    @settings(max_examples=300, deadline=None, derandomize=True)
    def check(value: object, ascii_only: bool) -> None:
        body = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert large_json.parse([body[:10], body[10:]]) == value

    check()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"a": "' + 30 * b"x",
        b'["' + 30 * b"x" + b'\\"',
        b'["' + 30 * b"x" + b'" "y"]',
        b'["' + 30 * b"x" + b'\n"]',
        b'["' + 30 * b"\xff" + b'"]',
        b'["' + 30 * rb"\u12" + b'"]',
        b'["' + 30 * b"x" + rb'\ud800"]',
        b'["' + 30 * b"x" + rb'\q"]',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        large_json.parse([body])


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 10**5 + b"[]]",
        b" " * 10**6,
        b'["", ' + b'"", ' * 10**5 + b'""]',
        b'["' + b"x" * large_json.MAX_TEXT,
        b'["' + b"x" * large_json.MAX_TEXT + b'"]',
    ],
    ids=["lists", "blanks", "texts", "endless", "long"],
)
def test_what_no_job_needs_is_not_read(body: bytes) -> None:
    with pytest.raises(large_json.TooLarge):
        large_json.parse([body])


def test_large_answers_are_sent_in_pieces() -> None:
    pictures = [base64.b64encode(bytes([seed]) * 10**6).decode() for seed in range(2)]
    value: dict[str, Any] = {"output": {"images": pictures, "prompt": '"é"'}, "id": "1"}

    async def sent() -> list[bytes]:
        return [piece async for piece in large_json.answer(value).body_iterator]

    pieces = asyncio.run(sent())
    assert json.loads(b"".join(pieces)) == value
    assert len(pieces) > 8 and max(map(len, pieces)) < 2**20
    length = large_json.answer(value).headers["Content-Length"]
    assert int(length) == sum(map(len, pieces))
