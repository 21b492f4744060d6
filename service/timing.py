"""Where the time of one request went, for the header `Server-Timing`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Part = Literal["parse", "judge", "log", "engine", "audit"]
"""Reading the body; judging its items; waiting for the log, for the engine, for the audit trail."""


class Timing:
    """Seconds by part, in the order in which the parts ended first."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def add(self, part: Part, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def header(self) -> bytes:
        """As in W3C Server Timing, in milliseconds; `total` is the time until now."""
        parts = self._seconds | {"total": time.perf_counter() - self._started}
        return ", ".join(f"{name};dur={s * 1000:.2f}" for name, s in parts.items()).encode()


# Tasks that a request starts inherit its recorder.
_current: ContextVar[Timing | None] = ContextVar("timing", default=None)


def begin() -> Timing:
    """Record what the current task, and those it starts, do from now on."""
    timing = Timing()
    _current.set(timing)
    return timing


def add(part: Part, seconds: float) -> None:
    """Note the time of a part of the current request, if there is one."""
    if (timing := _current.get()) is not None:
        timing.add(part, seconds)


@contextmanager
def measured(part: Part) -> Iterator[None]:
    """Note the time of what is inside."""
    started = time.perf_counter()
    try:
        yield
    finally:
        add(part, time.perf_counter() - started)
