"""Which log the settings name."""

from __future__ import annotations

import asyncio

from service.log.base import EventLog
from service.log.postgres import PostgresLog
from service.log.sqlite import SqliteLog
from service.settings import Settings


def open_log(settings: Settings) -> EventLog:
    """The PostgreSQL of `log_url`, or the file `log_path`. Raises LogUnavailable."""
    if settings.log_url is not None:
        return PostgresLog(settings.log_url.get_secret_value())
    return SqliteLog(settings.log_path)


def wait_for_log(settings: Settings) -> None:
    """Return when the log can be used, so that what a user can mend is said before all else.

    Raises LogUnavailable, after a while for a server that does not answer.
    """
    if settings.log_url is not None:
        asyncio.run(_open_and_close(PostgresLog(settings.log_url.get_secret_value())))


async def _open_and_close(log: EventLog) -> None:
    await log.open()
    await log.close()
