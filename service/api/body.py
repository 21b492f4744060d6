"""Request bodies: bounded in size and time while they stream in, then parsed once."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from service.api.problems import MAX_ERRORS, ClientGone, Problem, invalid, too_wide
from service.settings import Settings
from service.timing import measured

_M = TypeVar("_M", bound=BaseModel)


async def read_json(request: Request, settings: Settings) -> Any:
    """Parse a JSON body that is no longer, and comes no slower, than the settings allow.

    NaN and Infinity are let through, so that they can be refused where they stand. Raises Problem,
    ClientGone.
    """
    _check_media_type(request)
    try:
        async with asyncio.timeout(settings.write_deadline_seconds):
            body = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise Problem("body-timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGone from None
    try:
        with measured("parse"):
            return from_json(body, allow_inf_nan=True, cache_strings="keys")
    except (ValueError, RecursionError) as error:
        # The parser's message may quote the body.
        raise Problem("malformed-json") from error


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = Problem("body-too-large", f"at most {max_bytes} bytes are accepted")
    declared = request.headers.get("content-length", "")
    # As a float: an integer of thousands of digits is not read.
    if declared.isdecimal() and float(declared) > max_bytes:
        raise too_large
    body = bytearray()
    # Counted as it comes: a length may be missing or wrong.
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def validate(model: type[_M], body: Any) -> _M:
    """Read a parsed body into a model. Raises Problem."""
    _check_width(body)
    try:
        with measured("parse"):
            return model.model_validate(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from error


def _check_width(body: Any) -> None:
    """Raises Problem for more fields than there are names, each of which would be an error."""
    if not isinstance(body, dict):
        return
    if len(body) > MAX_ERRORS:
        raise too_wide("")
    for name, value in body.items():
        if isinstance(value, dict) and len(value) > MAX_ERRORS:
            raise too_wide(f"/{name}" if name == "statics" else "")


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json or encoding != "identity":
        raise Problem("unsupported-media-type", "send application/json without content encoding")
