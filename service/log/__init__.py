"""The log: what was received, in an append-only store that is the only source of truth."""

from service.log.base import (
    EventLog,
    LogCorrupt,
    LogUnavailable,
    Retired,
    SequenceConflict,
    Unconfirmed,
)
from service.log.postgres import PostgresLog
from service.log.sqlite import SqliteLog

__all__ = [
    "EventLog",
    "LogCorrupt",
    "LogUnavailable",
    "PostgresLog",
    "Retired",
    "SequenceConflict",
    "SqliteLog",
    "Unconfirmed",
]
