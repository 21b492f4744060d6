"""Reading the audit trail in either database, a line at a time, while others write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apsw
import psycopg

from service.log.base import LogUnavailable
from service.log.rows import from_audit_row
from service.log.sqlite_file import open_reader
from service.settings import Settings
from service.trail.record import AuditRecord

_LINES = "SELECT writer, seq, at, record, hash FROM audit WHERE at >= {0} AND at < {0} ORDER BY at"
_MOST_US = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """A line of the trail, and which one it is of the process that wrote it."""

    writer: str
    seq: int
    record: AuditRecord


def audit_lines(
    settings: Settings, since_us: int = 0, until_us: int = _MOST_US
) -> Iterator[AuditLine]:
    """The lines from an instant on, before another one, in the order of their times.

    Raises LogUnavailable, LogCorrupt.
    """
    bounds = (since_us, until_us)
    url = settings.log_url
    rows = (
        _of_file(settings, bounds) if url is None else _of_postgres(url.get_secret_value(), bounds)
    )
    for row in rows:
        yield AuditLine(writer=row[0], seq=row[1], record=from_audit_row(row))


_Row = tuple[str, int, int, str, bytes]


def _of_file(settings: Settings, bounds: tuple[int, int]) -> Iterator[_Row]:
    db = open_reader(settings.log_path)
    try:
        yield from db.execute(_LINES.format("?"), bounds)
    except apsw.Error as error:
        raise LogUnavailable(f"cannot read the log: {type(error).__name__}") from error
    finally:
        db.close()


def _of_postgres(url: str, bounds: tuple[int, int]) -> Iterator[_Row]:
    try:
        # A named cursor: the server hands the rows out as they are wanted.
        with psycopg.connect(url) as db, db.cursor("audit") as cursor:
            db.read_only = True
            cursor.execute(_LINES.format("%s"), bounds)
            yield from cursor
    except psycopg.Error as error:
        # The message may quote the URL.
        raise LogUnavailable(f"cannot read the log: {type(error).__name__}") from None
