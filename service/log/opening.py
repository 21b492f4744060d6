"""Which log the settings name."""

from __future__ import annotations

from service.log.base import EventLog
from service.log.postgres import PostgresLog
from service.log.sqlite import SqliteLog
from service.settings import Settings


def open_log(settings: Settings) -> EventLog:
    """The PostgreSQL of `log_url`, or the file `log_path`. Raises LogUnavailable."""
    if settings.log_url is not None:
        return PostgresLog(settings.log_url.get_secret_value())
    return SqliteLog(settings.log_path)
