"""Time stamps on the wire: RFC 3339 with an offset in, UTC out. A naive time is never accepted."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal

TimeErrorReason = Literal["time-invalid", "time-naive"]

# Narrower than datetime.fromisoformat, which also reads week dates and times without seconds.
_SHAPE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?"
    r"(?P<offset>[Zz]|[+-][0-9]{2}:[0-9]{2})?"
)


class TimeError(ValueError):
    """Not a usable time stamp."""

    def __init__(self, reason: TimeErrorReason, message: str) -> None:
        super().__init__(message)
        self.reason: TimeErrorReason = reason


def parse_time(text: object) -> datetime:
    """Read an RFC 3339 time stamp as UTC; digits beyond the microsecond are dropped.

    Raises TimeError: `time-naive` without an offset, `time-invalid` otherwise.
    """
    match = _SHAPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise TimeError("time-invalid", "an RFC 3339 time stamp is required")
    try:
        instant = datetime.fromisoformat(match[0].upper())
        if instant.tzinfo is None:
            raise TimeError("time-naive", "the time stamp needs an offset from UTC")
        return instant.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        if isinstance(error, TimeError):
            raise
        raise TimeError("time-invalid", "no such date or time") from error


def format_time(instant: datetime) -> str:
    """RFC 3339 in UTC, ending in Z."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")
