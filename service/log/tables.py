"""The tables of a log as the commands see them: whole, in order, in either database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal, Self, cast

import apsw
import psycopg
from psycopg import sql as pg

from service.log.base import LogCorrupt, LogUnavailable
from service.log.migrate import require_known, revision_of_postgres
from service.log.postgres_lanes import CHANNEL, parameters
from service.log.rows import Row
from service.log.sqlite_file import FileLock, open_reader, open_writer
from service.settings import Settings

Table = Literal["log", "audit", "retired"]
CHAINED: tuple[Table, ...] = ("log", "audit")
"""The tables whose rows carry hashes."""

_ORDER: dict[Table, str] = {
    "log": "episode_id, seq",
    "audit": "writer, seq",
    "retired": "episode_id",
}


class Tables(ABC):
    """A log opened by a command. As a context it is closed at the end."""

    @abstractmethod
    def execute(self, statement: str, *values: object) -> list[Row]:
        """All rows of a statement with `?` for each value. Raises LogUnavailable."""

    @abstractmethod
    def rows(self, table: Table) -> Iterator[Row]:
        """All rows of a table, in the order of its chains. Raises LogCorrupt, LogUnavailable."""

    @abstractmethod
    def insert(self, table: Table, rows: Iterable[Row]) -> None:
        """Raises LogUnavailable."""

    @abstractmethod
    def tell(self, episode_id: str) -> None:
        """Have replicas that run look at an episode, once the transaction is through."""

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[None]:
        """What is read in the block is of one moment, whoever writes meanwhile."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[None]:
        """What is written in the block is durable after it, or not written. Nobody else writes
        meanwhile.
        """

    @abstractmethod
    def close(self) -> None: ...

    def count(self, table: Table) -> int:
        [(n,)] = self.execute(f"SELECT count(*) FROM {table}")
        return int(n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SqliteTables(Tables):
    """A SQLite file, which this closes, and the lock that goes with it if it is written to."""

    def __init__(self, db: apsw.Connection, lock: FileLock | None = None) -> None:
        self._db = db
        self._lock = lock
        db.pragma("secure_delete", True)  # what is deleted is overwritten

    def execute(self, statement: str, *values: object) -> list[Row]:
        try:
            return self._db.execute(statement, cast(Any, values)).fetchall()
        except apsw.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def rows(self, table: Table) -> Iterator[Row]:
        try:
            yield from self._db.execute(f"SELECT * FROM {table} ORDER BY {_ORDER[table]}")
        except (apsw.CorruptError, UnicodeDecodeError) as error:
            raise LogCorrupt(f"the table {table} cannot be read to its end") from error
        except apsw.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def insert(self, table: Table, rows: Iterable[Row]) -> None:
        marks = ", ".join("?" * (10 if table == "log" else 5))
        try:
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", cast(Any, rows))
        except apsw.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def tell(self, episode_id: str) -> None:
        """Nobody is there: who writes to a file is alone."""

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        self.execute("BEGIN")
        self.execute("SELECT 1 FROM log LIMIT 1")  # the moment
        try:
            yield
        finally:
            self.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")

    def close(self) -> None:
        if self._lock is not None:
            # What was overwritten in the file stands in the WAL as it was before.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        if self._lock is not None:
            self._lock.release()


class PostgresTables(Tables):
    """A PostgreSQL. Its owner may write all tables, the role of the service may read them."""

    def __init__(self, url: str) -> None:
        """Raises LogUnavailable, WrongSchema."""
        try:
            self._db = psycopg.connect(**parameters(url), autocommit=True)
            require_known(revision_of_postgres(self._db))
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def execute(self, statement: str, *values: object) -> list[Row]:
        try:
            cursor = self._db.execute(cast(Any, statement.replace("?", "%s")), values or None)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def rows(self, table: Table) -> Iterator[Row]:
        query = f"SELECT * FROM {table} ORDER BY {_ORDER[table]}"
        try:
            with self._db.cursor(name=f"all_{table}") as cursor:
                cursor.itersize = 5_000
                yield from cursor.execute(cast(Any, query))
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def insert(self, table: Table, rows: Iterable[Row]) -> None:
        copy_in = pg.SQL("COPY {} FROM STDIN").format(pg.Identifier(table))
        try:
            with self._db.cursor() as cursor, cursor.copy(copy_in) as copy:
                for row in rows:
                    copy.write_row(row)
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def tell(self, episode_id: str) -> None:
        self.execute(f"SELECT pg_notify('{CHANNEL}', ?)", f"command {episode_id}")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        self.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            yield
        finally:
            if not self._db.closed:
                self.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.execute("BEGIN")
        try:
            self.execute("LOCK TABLE log IN SHARE ROW EXCLUSIVE MODE")  # reading goes on
            yield
        except BaseException:
            if not self._db.closed:
                self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


def open_tables(settings: Settings, *, writes: bool = False) -> Tables:
    """The log of the settings; to write to a file, no other process may have it.

    Raises LogUnavailable, WrongSchema.
    """
    if settings.log_url is not None:
        return PostgresTables(settings.log_url.get_secret_value())
    path = settings.log_path
    if not writes:
        return SqliteTables(open_reader(path))
    lock = FileLock(path)
    try:
        return SqliteTables(open_writer(path), lock)
    except LogUnavailable:
        lock.release()
        raise


def counted(rows: Iterable[Row], advance: Callable[[int], None]) -> Iterator[Row]:
    """The rows, told to a progress bar some at a time."""
    n = 0
    for n, row in enumerate(rows, start=1):
        yield row
        if n % 1_000 == 0:
            advance(1_000)
    advance(n % 1_000)
