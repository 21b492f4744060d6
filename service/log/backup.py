"""A log as one SQLite file, and back: of either database, into either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import apsw

from service.log.base import LogCorrupt, LogUnavailable
from service.log.migrate import WrongSchema, migrate_file
from service.log.sqlite_file import make_private, open_reader
from service.log.tables import CHAINED, SqliteTables, Table, Tables, text_of
from service.log.verify import Finding, follow

Advance = Callable[[int], None]

_TABLES: tuple[Table, ...] = (*CHAINED, "retired")


class Damaged(LogCorrupt):
    """A backup is not as it was written."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(f"the backup is not as it was written: {len(findings)} findings")
        self.findings = findings


def back_up(source: Tables, out: Path, advance: Advance) -> list[Finding]:
    """Copy a log of one moment into a new file, which appears when it is complete.

    Everything is copied, also what is not as it was written: that is returned.
    Raises FileExistsError, LogUnavailable, OSError.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists")
    partial = out.with_name(out.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with _new(partial) as target, source.snapshot(), target.transaction():
            findings = copy(source, target, advance)
        _sync(partial)
        os.replace(partial, out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(out.parent)
    return findings


def _new(path: Path) -> Tables:
    """A file with the schema and nothing else. Raises LogUnavailable."""
    try:
        make_private(path)
        db = apsw.Connection(str(path))
        # Until it is complete there is nothing to protect.
        db.pragma("journal_mode", "off")
        db.pragma("synchronous", "off")
        migrate_file(db)
    except (apsw.Error, OSError) as error:
        raise LogUnavailable(f"cannot write {path}: {error}") from error
    return SqliteTables(db)


def opened(backup: Path) -> Tables:
    """A backup, to be read. Raises LogUnavailable, WrongSchema."""
    try:
        return SqliteTables(open_reader(backup))
    except WrongSchema as error:
        raise WrongSchema(
            f"{backup} is of another version: {str(error).partition(':')[0]}; bring a copy of it up"
            " with `LLM4EHR_LOG_PATH=COPY python -m service log migrate` and restore that"
        ) from error


def restore(
    source: Tables, target: Tables, advance: Advance, *, damaged: bool = False
) -> list[Finding]:
    """Write a backup into an empty log, all of it or nothing.

    Returns what is not as it was written, if it may be `damaged`; otherwise raises Damaged for it.
    Raises ValueError if the log is not empty, LogUnavailable.
    """
    with source.snapshot(), target.transaction():
        if any(target.execute(f"SELECT 1 FROM {table} LIMIT 1") for table in _TABLES):
            raise ValueError("the log is not empty: a backup is restored into an empty one")
        findings = copy(source, target, advance)
        if any(source.count(table) != target.count(table) for table in _TABLES):
            raise LogCorrupt("not all of the backup was written")
        if findings and not damaged:
            raise Damaged(findings)
    return findings


def copy(source: Tables, target: Tables, advance: Advance) -> list[Finding]:
    """All rows of a log into an empty one; returns what is not as it was written."""
    findings = follow(source, {}, advance, target.insert)
    # Last: entries of an episode that is retired are refused.
    target.insert("retired", ((text_of(row[0]), *row[1:]) for row in source.rows("retired")))
    return findings


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
