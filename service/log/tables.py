"""The tables of a log as the commands see them: whole, in order, in either database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Literal, Self, cast

import apsw
import psycopg
from psycopg import sql as pg

from service.log.base import LogCorrupt, LogUnavailable
from service.log.migrate import require_known, revision_of_postgres
from service.log.postgres_lanes import CHANNEL, DURABLE, parameters
from service.log.rows import Row
from service.log.sqlite_file import FileLock, open_reader, open_writer, real
from service.settings import Settings

Table = Literal["log", "audit", "retired"]
CHAINED: tuple[Table, ...] = ("log", "audit")
"""The tables whose rows carry hashes."""

_KEY: dict[Table, tuple[str, ...]] = {
    "log": ("episode_id", "seq"),
    "audit": ("writer", "seq"),
    "retired": ("episode_id",),
}

_LOCK_TIMEOUT = "3s"
"""How long a command waits for the lock of its transaction. Appends wait behind it, 5 s at most."""


class NotOverwritten(LogUnavailable):
    """What was written is durable; what it took away can still be found in the file."""


class Tables(ABC):
    """A log opened by a command. As a context it is closed at the end."""

    @abstractmethod
    def execute(self, statement: str, *values: object) -> list[Row]:
        """All rows of a statement with `?` for each value. Raises LogUnavailable."""

    @abstractmethod
    def rows(self, table: Table, where: str = "TRUE") -> Iterator[Row]:
        """All rows of a table for which a condition holds, in the order of its chains; bytes in
        place of a text that cannot be decoded. Needs a snapshot or a transaction.

        Raises LogCorrupt if what follows cannot be read, LogUnavailable.
        """

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
    def close(self) -> None:
        """Raises NotOverwritten."""

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
        # What went wrong in the block is what is told.
        with suppress(NotOverwritten) if error is not None else nullcontext():
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
        except UnicodeDecodeError as error:
            raise LogCorrupt("the log holds text that cannot be decoded") from error
        except apsw.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def rows(self, table: Table, where: str = "TRUE") -> Iterator[Row]:
        key = len(_KEY[table])
        last: Row = ()
        try:
            found = iter(self._db.execute(_select(table, where)))
            while True:
                try:
                    row = next(found, None)
                except UnicodeDecodeError:  # the next call goes on behind it
                    row = self._undecoded(table, where, last)
                if row is None:
                    return
                last = row[:key]
                yield row
        except apsw.CorruptError as error:
            raise LogCorrupt(f"the table {table} cannot be read to its end") from error
        except apsw.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def _undecoded(self, table: Table, where: str, last: Row) -> Row:
        """The row that follows the one of key `last`, bytes in place of text that is none."""
        columns = [str(row[1]) for row in self.execute(f"PRAGMA table_info({table})")]
        values = ", ".join(f"iif(typeof({c}) = 'text', CAST({c} AS BLOB), {c})" for c in columns)
        if last:
            # What is text already stays as it is.
            marks = ", ".join(["CAST(? AS TEXT)", "?"][: len(last)])
            where = f"({where}) AND ({', '.join(_KEY[table])}) > ({marks})"
        [row] = self.execute(f"{_select(table, where, values)} LIMIT 1", *last)
        return (*map(_decoded, row[:-1]), row[-1] if columns[-1] == "hash" else _decoded(row[-1]))

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
            if self._db.in_transaction:
                self.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # some errors end it by themselves
                self.execute("ROLLBACK")
            raise

    def close(self) -> None:
        try:
            if self._lock is not None:
                self._overwrite()
        finally:
            self._db.close()
            if self._lock is not None:
                self._lock.release()

    def _overwrite(self) -> None:
        """Bring into the file what stands in the WAL: until then the file is as it was before."""
        try:
            [(busy, _, _)] = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            why = "another program reads it" if busy else None
        except apsw.Error as error:
            why = str(error)
        if why is not None:
            raise NotOverwritten(
                f"what was written is durable, but the file of the log is not yet overwritten:"
                f" {why}; run `python -m service log migrate` when that is over"
            )


class PostgresTables(Tables):
    """A PostgreSQL. Its owner may write all tables, the role of the service may read them."""

    def __init__(self, url: str) -> None:
        """Raises LogUnavailable, WrongSchema."""
        try:
            self._db = psycopg.connect(**parameters(url), autocommit=True)
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error
        try:
            require_known(revision_of_postgres(self._db))
        except psycopg.Error as error:
            self._db.close()
            raise LogUnavailable(f"the log: {error}") from error
        except LogUnavailable:
            self._db.close()
            raise

    def execute(self, statement: str, *values: object) -> list[Row]:
        try:
            cursor = self._db.execute(cast(Any, statement.replace("?", "%s")), values or None)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise LogUnavailable(f"the log: {error}") from error

    def rows(self, table: Table, where: str = "TRUE") -> Iterator[Row]:
        try:
            with self._db.cursor(name=f"all_{table}") as cursor:
                cursor.itersize = 5_000
                yield from cursor.execute(cast(Any, _select(table, where)))
        except UnicodeDecodeError as error:  # the server takes none: its disk is damaged
            raise LogCorrupt(f"the table {table} cannot be read to its end") from error
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
            self.execute(f"SELECT set_config('lock_timeout', '{_LOCK_TIMEOUT}', true)")
            self.execute(DURABLE.format(local="true"))
            # Neither trigger nor head show an append that has begun and is not committed yet: it
            # would add a row to an episode that is gone. Reading goes on.
            self.execute("LOCK TABLE log IN SHARE ROW EXCLUSIVE MODE")
            yield
            self.execute("COMMIT")
        except BaseException:
            if not self._db.closed:
                self.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._db.close()


def open_tables(settings: Settings, *, writes: bool = False) -> Tables:
    """The log of the settings; to write to a file, no other process may have it.

    Raises LogUnavailable, WrongSchema.
    """
    if settings.log_url is not None:
        return PostgresTables(settings.log_url.get_secret_value())
    path = real(settings.log_path)
    if not writes:
        return SqliteTables(open_reader(path))
    lock = FileLock(path)
    try:
        return SqliteTables(open_writer(path), lock)
    except LogUnavailable:
        lock.release()
        raise


def text_of(value: object) -> object:
    """A value of a row; bytes that are no text made into some that can be shown and written."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _decoded(value: object) -> object:
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _select(table: Table, where: str, columns: str = "*") -> str:
    return f"SELECT {columns} FROM {table} WHERE {where} ORDER BY {', '.join(_KEY[table])}"


def counted(rows: Iterable[Row], advance: Callable[[int], None]) -> Iterator[Row]:
    """The rows, told to a progress bar some at a time."""
    n = 0
    for n, row in enumerate(rows, start=1):
        yield row
        if n % 1_000 == 0:
            advance(1_000)
    advance(n % 1_000)
