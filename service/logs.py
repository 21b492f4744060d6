"""The application's log: text for people, or JSON for machines. Nothing in it is of a patient.

Every line that is written while a request is answered carries the id of the request, and in JSON
also its place in the trace that its client named. Tracebacks name errors and places in the code,
and leave the errors' own words out: they may quote a value.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from traceback import format_tb
from types import TracebackType
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

Format = Literal["text", "json"]

_HANDLER = "llm4ehr"

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


@dataclass(slots=True)
class Request:
    """What the lines about one request have in common."""

    request_id: str
    trace_id: str | None = None
    """32 hexadecimal digits."""
    span_id: str | None = None
    """16 hexadecimal digits: of the client's span, or of our own where traces are on."""


# Tasks that a request starts inherit it.
_current: ContextVar[Request | None] = ContextVar("request", default=None)


def begin(request: Request) -> None:
    """The current task, and those it starts, work for this request from now on."""
    _current.set(request)


def within_span(trace_id: int, span_id: int) -> None:
    """The current request has a span of its own."""
    if (request := _current.get()) is not None:
        request.trace_id, request.span_id = f"{trace_id:032x}", f"{span_id:016x}"


def configure(log_format: Format) -> None:
    """Write the log to the standard error, from INFO on; once more changes the format.

    Does nothing if somebody else has taken the log in hand.
    """
    root = logging.getLogger()
    if any(handler.get_name() != _HANDLER for handler in root.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    # It tells of every start what it did not have to do.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.captureWarnings(True)


class _Text(logging.Formatter):
    """`LEVEL logger: message`, and the request it is about."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the base class's)
        line = super().formatMessage(record)
        request = _current.get()
        return line if request is None else f"{line} [request {request.request_id}]"

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return _traceback(ei)


class _Json(JsonFormatter):
    """One object a line; fields that a line brings along follow those that all have."""

    def __init__(self) -> None:
        # uvicorn says some lines twice, once in colours.
        super().__init__("%(message)s", reserved_attrs=[*RESERVED_ATTRS, "color_message"])

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data["time"] = (
            datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        super().add_fields(log_data, record, message_dict)
        if (request := _current.get()) is not None:
            log_data["request_id"] = request.request_id
            if request.trace_id is not None:
                log_data["trace_id"], log_data["span_id"] = request.trace_id, request.span_id

    def formatException(self, ei: _ExcInfo) -> Any:  # noqa: N802
        return _traceback(ei)


def _traceback(ei: _ExcInfo) -> str:
    """Where it happened and what kind of error it was, without its message."""
    kind, _, frames = ei
    return "".join([*format_tb(frames), kind.__name__ if kind is not None else ""])
