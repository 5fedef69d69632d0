"""OpenAI's image routes, for its clients."""

from __future__ import annotations

import asyncio
from typing import Any, BinaryIO

import pybase64
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import UploadFile

from image_worker.errors import ErrorReply, InvalidRequest
from image_worker.job.request import EditRequest
from image_worker.serve import large_json, openai_api
from image_worker.serve.http_server import (
    KEY,
    Refusal,
    Server,
    TheServer,
    body_of,
    errors,
    read_json,
    takes,
)


class OpenAIFailure(BaseModel):
    """An error; `param` names the field at fault, if one is."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    error: OpenAIFailure


class Generation(BaseModel):
    """What OpenAI's /v1/images/generations takes; `openai_api.py` says what is possible."""

    model_config = ConfigDict(extra="allow")

    prompt: str


_TEXTS = ("prompt", "model", "size", "output_format", "negative_prompt")
_FIELDS = EditRequest.model_json_schema()["properties"]


def _as_in_jobs(name: str) -> dict[str, Any]:
    """A job's field, but for null, of which forms have none."""
    field: dict[str, Any] = _FIELDS[name]
    return field.get("anyOf", [field])[0]  # type: ignore[no-any-return]


_PICTURE = {"type": "string", "format": "binary"}
_EDIT_FORM = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {
        "image": {
            "type": "array",
            "items": _PICTURE,
            "minItems": 1,
            "maxItems": 4,
            "description": "also as image[]",
        },
        "model": {"type": "string"},
        "n": _as_in_jobs("num_images"),
        "size": {"type": "string", "description": "auto, or as in 1024x768"},
        "output_compression": _as_in_jobs("quality"),
        **{name: _as_in_jobs(name) for name in openai_api.SAME},
    },
}

MODELS = (Generation, OpenAIErrorBody)  # that routes only name in the document
router = APIRouter(tags=["openai"], dependencies=[KEY])
_ERRORS = errors(400, 401, 413, 422, 429, 503, body=OpenAIErrorBody)


@router.post(
    openai_api.EDITS,
    responses=_ERRORS,
    response_model=dict[str, Any],
    openapi_extra=takes({"multipart/form-data": {"schema": _EDIT_FORM}}),
)
async def edits(server: TheServer, request: Request) -> StreamingResponse:
    """As OpenAI's: edits the pictures of a form."""
    return await _made(server, openai_api.EDITS, await _form(request), request)


@router.post(
    openai_api.GENERATIONS,
    responses=_ERRORS,
    response_model=dict[str, Any],
    openapi_extra=takes(body_of(Generation)),
)
async def generations(server: TheServer, request: Request) -> StreamingResponse:
    """As OpenAI's: a picture from a text, where the model makes them."""
    return await _made(server, openai_api.GENERATIONS, await read_json(request), request)


@router.get("/v1/models", responses=errors(401, body=OpenAIErrorBody))
async def models(server: TheServer) -> dict[str, Any]:
    """The one model that is served."""
    one = {"id": server.worker.entry.name, "object": "model", "created": 0, "owned_by": "qwen"}
    return {"object": "list", "data": [one]}


async def _made(server: Server, route: str, fields: object, request: Request) -> StreamingResponse:
    try:
        job_input = openai_api.to_input(route, fields, server.worker.entry)
    except InvalidRequest as error:
        raise Refusal(400, error.reply()) from None
    job = await server.finish(await server.submit({"input": job_input}), request)
    reply = job.reply or {"error": {"type": "cancelled", "message": "", "retryable": True}}
    if "error" in reply:
        raise Refusal(_status_of(reply["error"]), reply["error"])
    return large_json.answer(openai_api.answer(reply))


def _status_of(error: ErrorReply) -> int:
    """OpenAI's clients try again by themselves what has a status from 500."""
    if error["retryable"]:
        return 503
    return 400 if error["type"].startswith("invalid") else 422


async def _form(request: Request) -> dict[str, Any]:
    """A form's fields, numbers as numbers, files as base64."""
    fields: dict[str, Any] = {}
    async with request.form(max_files=16, max_fields=64) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            files = fields.get(name, [])
            if not isinstance(files, list) or (files and not isinstance(value, UploadFile)):
                message = "give one text, or files"
                raise Refusal(400, InvalidRequest(message, field=name[:100]).reply())
            if isinstance(value, UploadFile):
                data = await asyncio.to_thread(_base64, value.file)
                fields[name] = [*files, {"base64": data}]
            else:
                fields[name] = value if name in _TEXTS else _number(value)
    return fields


def _base64(file: BinaryIO) -> str:
    return pybase64.b64encode_as_string(file.read())


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
