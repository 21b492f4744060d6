"""Request bodies: bounded while they stream in, then parsed once."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from service.api.problems import Problem, invalid
from service.timing import measured

_M = TypeVar("_M", bound=BaseModel)


async def read_json(request: Request, max_bytes: int) -> Any:
    """Parse a JSON body of at most `max_bytes`.

    NaN and Infinity are let through, so that they can be refused where they stand. Raises Problem.
    """
    _check_media_type(request)
    too_large = Problem("body-too-large", f"at most {max_bytes} bytes are accepted")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    # Counted as it comes: a length may be missing or wrong.
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    try:
        with measured("parse"):
            return from_json(bytes(body), allow_inf_nan=True, cache_strings="keys")
    except (ValueError, RecursionError) as error:
        # The parser's message may quote the body.
        raise Problem("malformed-json") from error


def validate(model: type[_M], body: Any) -> _M:
    """Read a parsed body into a model. Raises Problem."""
    try:
        with measured("parse"):
            return model.model_validate(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from error


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json or encoding != "identity":
        raise Problem("unsupported-media-type", "send application/json without content encoding")
