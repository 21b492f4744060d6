"""Lines of the log: as text, as JSON, with what they are about, without what errors quote."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from service import logs
from service.logs import Request

CANARY = "CANARY-0815"


@contextmanager
def alone() -> Iterator[io.StringIO]:
    """The standard error, with nobody else listening to the log."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = []
    token = logs._current.set(None)
    try:
        with redirect_stderr(io.StringIO()) as stream:
            yield stream
    finally:
        logs._current.reset(token)
        logging.captureWarnings(False)
        root.handlers = before
        root.setLevel(level)


def fail() -> None:
    try:
        raise ValueError(f"the value {CANARY}")
    except ValueError:
        logging.getLogger("service.x").exception("it failed")


def test_text() -> None:
    with alone() as stream:
        logs.configure("text")
        logger = logging.getLogger("service.x")
        logger.info("%d things", 3)
        logger.debug("not this")
        logs.begin(Request("r-1", "a" * 32, "b" * 16))
        logger.warning("of a request")
        assert stream.getvalue().splitlines() == [
            "INFO service.x: 3 things",
            "WARNING service.x: of a request [request r-1]",
        ]


def test_migrations_tell_of_what_is_wrong_alone() -> None:
    with alone() as stream:
        logs.configure("text")
        logger = logging.getLogger("alembic.runtime.migration")
        logger.info("Context impl SQLiteImpl.")
        logger.warning("odd")
        assert stream.getvalue().splitlines() == ["WARNING alembic.runtime.migration: odd"]


def test_json() -> None:
    with alone() as stream:
        logs.configure("text")
        logs.configure("json")  # once more changes the format
        logger = logging.getLogger("service.x")
        logger.info("%d things", 3)
        logs.begin(Request("r-1"))
        logger.info("without a trace", extra={"status": 200, "color_message": "again"})
        logs.begin(Request("r-2", "a" * 32, "b" * 16))
        logger.info("within one")
        logs.within_span(0x123, 0x45)
        logger.info("within a span of our own")
        first, second, third, fourth = map(json.loads, stream.getvalue().splitlines())
        assert list(first) == ["time", "level", "logger", "message"]
        assert first | {"time": ""} == {
            "time": "", "level": "INFO", "logger": "service.x", "message": "3 things",
        }  # fmt: skip
        assert first["time"].endswith("Z")
        assert (second["request_id"], second["status"]) == ("r-1", 200)
        assert not {"trace_id", "color_message"} & second.keys()
        assert (third["request_id"], third["trace_id"], third["span_id"]) == (
            "r-2", "a" * 32, "b" * 16,
        )  # fmt: skip
        assert (fourth["trace_id"], fourth["span_id"]) == (f"{0x123:032x}", f"{0x45:016x}")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_says_where_and_not_what(log_format: logs.Format) -> None:
    with alone() as stream:
        logs.configure(log_format)
        fail()
        written = stream.getvalue()
        assert "it failed" in written
        assert "ValueError" in written
        assert "in fail" in written
        assert CANARY not in written


def test_warnings_are_lines_too() -> None:
    with alone() as stream:
        logs.configure("json")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)  # what catches warnings above took it away
            warnings.warn("something is odd", UserWarning, stacklevel=1)
        line = json.loads(stream.getvalue())
        assert (line["logger"], line["level"]) == ("py.warnings", "WARNING")
        assert "something is odd" in line["message"]


def test_a_log_in_other_hands_is_left_there() -> None:
    with alone():
        other = logging.NullHandler()
        logging.getLogger().handlers = [other]
        logs.configure("json")
        assert logging.getLogger().handlers == [other]
