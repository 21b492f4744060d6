"""Brings a database to the schema that this version of the service knows.

Alembic knows the steps and writes their SQL; the log's own drivers execute it, in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from io import StringIO
from pathlib import Path

import apsw
import psycopg
from psycopg import sql as pg

from service.log.base import LogUnavailable
from service.log.postgres_lanes import parameters
from service.log.rows import FIRST, chain_hash

SCHEMA = "0002"
"""The step of the schema that this version reads and writes."""

# What SQLite files say in `PRAGMA user_version`: 1 is from before there were steps.
_FIRST_VERSION, USER_VERSION = 1, 2

_REVISION = "SELECT version_num FROM alembic_version"


class WrongSchema(LogUnavailable):
    """The database has not the schema that this version knows."""


def require_known(revision: str | None) -> None:
    """Raises WrongSchema, which says what to do, unless it is the step that this version knows."""
    if revision != SCHEMA:
        raise WrongSchema(
            f"the log has schema {revision or '(none)'}, this version needs {SCHEMA}:"
            " run `python -m service log migrate`"
        )


def revision_of_file(db: apsw.Connection) -> str | None:
    """The step of a SQLite file; None of an empty one. Raises WrongSchema for a foreign one."""
    version = db.pragma("user_version")
    if version == 0:
        return None
    if version == _FIRST_VERSION:
        return "0001"
    if version != USER_VERSION:
        raise WrongSchema(f"the log has schema {version}, this version reads {SCHEMA}")
    return str(db.execute(_REVISION).get)


def migrate_file(db: apsw.Connection, advance: Callable[[], None] = lambda: None) -> None:
    """Bring a SQLite file to SCHEMA; `advance` is called for every row that is written anew.

    Raises WrongSchema, apsw.Error.
    """
    if (revision := revision_of_file(db)) == SCHEMA:
        return
    db.create_scalar_function("chain_hash", _Chains(advance))
    with db:
        # Another process may have been faster: who holds the lock looks again.
        if (revision := revision_of_file(db)) == SCHEMA:
            return
        if db.pragma("user_version") == _FIRST_VERSION:
            _execute(db, _steps("sqlite", "stamp", "0001"))
        _execute(db, _steps("sqlite", "upgrade", f"{revision or 'base'}:{SCHEMA}"))


def _execute(db: apsw.Connection, statements: str) -> None:
    """All of them: apsw goes on to the next one when the rows of one before were taken."""
    db.execute(statements).fetchall()


def migrate_postgres(url: str, role: str | None = None) -> None:
    """Bring a PostgreSQL to SCHEMA, and let `role` do what the service does and no more.

    Raises WrongSchema, LogUnavailable.
    """
    try:
        with psycopg.connect(**parameters(url)) as db:
            db.execute("SELECT pg_advisory_xact_lock(7306085371920384)")  # one at a time
            encoding = db.execute("SHOW server_encoding").fetchone()
            if encoding != ("UTF8",):
                raise WrongSchema("the database of the log must have the encoding UTF8")
            if (revision := revision_of_postgres(db)) != SCHEMA:
                db.execute(_steps("postgresql", "upgrade", f"{revision or 'base'}:{SCHEMA}"))
            if role is not None:
                _grant(db, role)
    except psycopg.Error as error:
        raise LogUnavailable(f"the log cannot be migrated: {error}") from error


def revision_of_postgres(db: psycopg.Connection) -> str | None:
    """The step of a PostgreSQL; None of an empty one. Raises psycopg.Error."""
    exists = db.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
    if exists != (True,):
        return None
    row = db.execute(_REVISION).fetchone()
    return None if row is None else str(row[0])


RETIRED_STATE = "EHR01"
"""SQLSTATE of an insert into an episode that is retired."""

GRANTS = (
    "GRANT SELECT, INSERT ON log, audit TO {role}",
    "GRANT SELECT ON retired, alembic_version TO {role}",
)
"""What the role of the service needs."""


def _grant(db: psycopg.Connection, role: str) -> None:
    for statement in GRANTS:
        db.execute(pg.SQL(statement).format(role=pg.Identifier(role)))


@cache
def _steps(dialect: str, command: str, to: str) -> str:
    """The SQL of Alembic's `command` in one of the dialects."""
    # Needed for no file that has the schema already.
    from alembic import command as commands
    from alembic.config import Config

    text = StringIO()
    config = Config(output_buffer=text, attributes={"dialect": dialect})
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("version_locations", str(folder / "versions").replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    getattr(commands, command)(config, to, sql=True)
    return text.getvalue()


class _Chains:
    """SQL function: the hash of a row, if it sees the rows of each episode in their order."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._episode: object = None
        self._hash = FIRST
        self._advance = advance

    def __call__(self, *values: object) -> bytes:
        if values[0] != self._episode:
            self._episode, self._hash = values[0], FIRST
        self._hash = chain_hash(self._hash, values)
        self._advance()
        return self._hash
