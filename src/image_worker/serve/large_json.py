"""JSON with pictures in it: megabytes of base64, for which the event loop must not wait.

A parser keeps the interpreter to itself until it is done, on a thread, too: Python's own takes
0.2 s for the largest job, and 15 s for as many bytes of `[],`. So long texts are cut out of a body
and read in pieces, and the rest must be short. Answers are sent in pieces, too.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import from_json

from image_worker.job.images import MAX_BYTES

LONG = 2**15  # a longer text in an answer is base64 and needs no escapes; prompts are shorter
MAX_TEXT = MAX_BYTES * 4 // 3 * 11 // 10  # bytes: a picture in base64, with line breaks
MAX_REST = 2**18  # bytes of a body without long texts; four pictures and two prompts are less
_PIECE = 2**18  # of a long text, that is read or sent at a time
_LONGEST_ESCAPE = len(r"\ud83d\ude00")


class TooLarge(Exception):
    """The body of no right job."""


def parse(chunks: Iterable[bytes]) -> Any:
    """The value of a JSON body, in UTF-8. Blocks: call it on a thread.

    Raises:
        TooLarge: a text, or all that is not a long text, is larger than jobs need.
        ValueError: not JSON.
    """
    body = b"".join(chunks)
    secret = secrets.token_hex()  # so that no caller's text is taken for a name
    texts: dict[str, str] = {}
    rest: list[bytes | memoryview] = []
    kept = 0
    for start, end in _long_texts(body):
        name = f"{secret}{len(texts)}"
        texts[name] = _text(body, start + 1, end - 1)
        rest += [memoryview(body)[kept:start], f'"{name}"'.encode()]
        kept = end
    rest.append(memoryview(body)[kept:])
    return _with_texts(from_json(b"".join(rest)), texts)


def _long_texts(body: bytes) -> Iterator[tuple[int, int]]:
    """Where they begin and end, quotes included."""
    end = short = 0  # bytes that are in no long text
    while short <= MAX_REST and (start := body.find(b'"', end)) >= 0:
        short += start - end
        end = _end(body, start)
        if end - start > LONG:
            yield start, end
        else:
            short += end - start
    if short + len(body) - end > MAX_REST:
        raise TooLarge(f"without its pictures, a body may have {MAX_REST // 2**10} KiB")


def _end(body: bytes, start: int) -> int:
    """Behind the text whose opening quote is at `start`."""
    end = start
    while (end := body.find(b'"', end + 1, start + MAX_TEXT)) >= 0:
        escape = end
        while body[escape - 1] == ord("\\"):
            escape -= 1
        if (end - escape) % 2 == 0:
            return end + 1
    if len(body) - start > MAX_TEXT:
        raise TooLarge(f"a picture may have {MAX_BYTES // 2**20} MiB")
    raise ValueError("a text has no end")


def _text(body: bytes, start: int, end: int) -> str:
    """What is written between two quotes."""
    pieces = []
    while start < end:
        # A piece that ends within an escape or a character is no JSON: it is tried a byte longer.
        for stop in range(start + _PIECE, start + _PIECE + _LONGEST_ESCAPE):
            try:
                pieces.append(from_json(b'"%b"' % body[start : min(stop, end)]))
                break
            except ValueError as error:
                wrong = error
        else:
            raise wrong
        start = stop
    return "".join(pieces)


def _with_texts(value: Any, texts: dict[str, str]) -> Any:
    """`value`, with the texts in place of their names."""
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {texts.get(name, name): _with_texts(item, texts) for name, item in value.items()}
    return value


def answer(value: object) -> StreamingResponse:
    """`value` as an HTTP answer."""
    found = parts(value)
    headers = {"Content-Length": str(sum(map(len, found)))}
    return StreamingResponse(send(found), headers=headers, media_type="application/json")


def parts(value: object) -> list[str]:
    """The JSON of `value`, in ASCII, with each long text as a part of its own."""
    secret = secrets.token_hex()
    texts: list[str] = []
    first, *short = json.dumps(_without_texts(value, secret, texts), allow_nan=False).split(secret)
    return [first, *(part for pair in zip(texts, short, strict=True) for part in pair)]


def _without_texts(value: object, name: str, texts: list[str]) -> object:
    """`value`, with `name` in place of each long text; these go to `texts`."""
    if isinstance(value, str) and len(value) > LONG:
        texts.append(value)
        return name
    if isinstance(value, list):
        return [_without_texts(item, name, texts) for item in value]
    if isinstance(value, dict):
        return {key: _without_texts(item, name, texts) for key, item in value.items()}
    return value


async def send(texts: Iterable[str]) -> AsyncIterator[bytes]:
    """The texts, cut into pieces."""
    for text in texts:
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE].encode()
            await asyncio.sleep(0)  # a fast reader never makes this wait, and others would
