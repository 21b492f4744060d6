"""The durable, append-only record of what was received."""

from __future__ import annotations

from service.log.base import EventLog, LogUnavailable, SequenceConflict
from service.log.sqlite import SqliteLog

__all__ = ["EventLog", "LogUnavailable", "SequenceConflict", "SqliteLog"]
