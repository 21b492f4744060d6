"""The log in one SQLite file: WAL, synchronous=FULL, a single writing connection, group commit.

One thread owns the only connection that writes and checkpoints: libraries before 3.51.3 can corrupt
a WAL database that two connections checkpoint at once, and are refused. The thread takes whatever
waits and commits it together, so the cost of one disk flush is shared exactly when there is load.
Readers have their own read-only connection and thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import apsw

from service.entries import Draft, Entry
from service.log.base import EventLog, LogUnavailable, SequenceConflict
from service.log.rows import from_rows, number, to_row

SCHEMA_VERSION = 1
MIN_SQLITE = 3_051_003
MAX_GROUP = 256
"""Appends in one transaction; bounds how long the first of them waits for the last."""

_BUSY_MS = 5_000

# How often a log that could not be written is tried again while nobody writes.
_TRY_AGAIN_S = 5.0

_SCHEMA = """
CREATE TABLE log (
    episode_id   TEXT    NOT NULL,
    seq          INTEGER NOT NULL CHECK (seq > 0),
    kind         TEXT    NOT NULL,
    item_id      TEXT,
    effective_at INTEGER,              -- microseconds since 1970, UTC, as are all times here
    available_at INTEGER,
    recorded_at  INTEGER NOT NULL,
    target       TEXT,
    payload      TEXT    NOT NULL,     -- JSON
    PRIMARY KEY (episode_id, seq),
    UNIQUE (episode_id, item_id)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER log_is_never_updated BEFORE UPDATE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_is_never_deleted BEFORE DELETE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
"""

_INSERT = "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_HEAD = "SELECT coalesce(max(seq), 0) FROM log WHERE episode_id = ?"
_ENTRIES = """
SELECT seq, kind, item_id, effective_at, available_at, recorded_at, target, payload
FROM log WHERE episode_id = ? AND seq > ? ORDER BY seq
"""
# Steps from one episode to the next through the primary key instead of reading every row.
_EPISODES = """
WITH RECURSIVE episode (id) AS (
    SELECT min(episode_id) FROM log
    UNION ALL
    SELECT (SELECT min(episode_id) FROM log WHERE episode_id > episode.id)
    FROM episode WHERE episode.id IS NOT NULL
)
SELECT id FROM episode WHERE id IS NOT NULL
ORDER BY (SELECT recorded_at FROM log WHERE episode_id = id ORDER BY seq DESC LIMIT 1) DESC, id
"""

_T = TypeVar("_T")


@dataclass(slots=True)
class _Append:
    """One call of `append` on its way to the writer, and what came of it."""

    episode_id: str
    drafts: Sequence[Draft]
    recorded_at: datetime
    expected_seq: int | None
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Entry]]
    entries: list[Entry] | None = None
    error: Exception | None = None


class SqliteLog(EventLog):
    """A log in the file `path`, made if it does not exist.

    Raises LogUnavailable if the SQLite library is too old, or the file cannot be opened or was
    written by another version of this schema.
    """

    def __init__(self, path: Path) -> None:
        if apsw.SQLITE_VERSION_NUMBER < MIN_SQLITE or _library_version() < MIN_SQLITE:
            raise LogUnavailable(
                f"SQLite {apsw.sqlite_lib_version()} is too old: 3.51.3 or later is needed"
            )
        try:
            self._writer = _open_writer(path)
            self._reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        except (apsw.Error, OSError) as error:
            raise LogUnavailable(f"cannot open the log {path}: {error}") from error
        self._reader.set_busy_timeout(_BUSY_MS)
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._available = True
        self._closed = False
        self._read_pool = ThreadPoolExecutor(1, thread_name_prefix="log-read")
        self._thread = threading.Thread(target=self._write_loop, name="log-write", daemon=True)
        self._thread.start()

    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
    ) -> list[Entry]:
        if not drafts:
            raise ValueError("nothing to append")
        if self._closed:
            raise LogUnavailable("the log is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Entry]] = loop.create_future()
        self._queue.put(
            _Append(
                episode_id=episode_id,
                drafts=drafts,
                recorded_at=recorded_at,
                expected_seq=expected_seq,
                loop=loop,
                future=future,
            )
        )
        return await future

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        return await self._read(
            lambda db: from_rows(
                episode_id, db.execute(_ENTRIES, (episode_id, after_seq)).fetchall()
            )
        )

    async def episode_ids(self) -> list[str]:
        return await self._read(lambda db: [str(row[0]) for row in db.execute(_EPISODES)])

    def available(self) -> bool:
        return self._available and not self._closed

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._read_pool.shutdown)
        # The writer goes last: whoever closes last checkpoints.
        self._reader.close()
        self._writer.close()

    async def _read(self, query: Callable[[apsw.Connection], _T]) -> _T:
        if self._closed:
            raise LogUnavailable("the log is closed")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._read_pool, query, self._reader)
        except apsw.Error as error:
            raise LogUnavailable(f"cannot read the log: {type(error).__name__}") from error

    def _write_loop(self) -> None:
        try:
            while (first := self._next()) is not None:
                group = [first]
                try:
                    closing = self._fill(group)
                    self._commit(group)
                finally:
                    _deliver(group)
                if closing:
                    return
        finally:
            # Whatever ended this thread, nobody may wait for it.
            self._closed = True
            late = []
            while not self._queue.empty():
                late.append(self._queue.get_nowait())
            _deliver([append for append in late if append is not None])

    def _next(self) -> _Append | None:
        """Wait for something to write; meanwhile find out when an unavailable log is well again."""
        while not self._available:
            try:
                return self._queue.get(timeout=_TRY_AGAIN_S)
            except queue.Empty:
                self._try_again()
        return self._queue.get()

    def _try_again(self) -> None:
        """Write what is there already: the disk and the lock are needed, the log stays as it is."""
        with contextlib.suppress(apsw.Error, OSError, MemoryError):
            self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._available = True

    def _fill(self, group: list[_Append]) -> bool:
        """Add what already waits to a group; True if the log is to close after it."""
        while len(group) < MAX_GROUP:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return True
            group.append(waiting)
        return False

    def _commit(self, group: Sequence[_Append]) -> None:
        """Write a group in one transaction. Entries are handed out only once it is durable."""
        db = self._writer
        written: list[tuple[_Append, list[Entry]]] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            for append in group:
                try:
                    written.append((append, self._write_one(append)))
                except (SequenceConflict, TypeError, ValueError) as error:
                    append.error = error
            db.execute("COMMIT")
        except (apsw.Error, OSError, MemoryError) as error:
            self._available = False
            for append in group:
                append.error = LogUnavailable(f"cannot write the log: {type(error).__name__}")
                append.error.__cause__ = error
            if db.in_transaction:
                db.execute("ROLLBACK")
            return
        self._available = True
        for append, entries in written:
            append.entries = entries

    def _write_one(self, append: _Append) -> list[Entry]:
        """One append under a savepoint, so that its failure leaves its neighbours alone.

        Errors of the disk concern the whole transaction and pass through.
        """
        db = self._writer
        try:
            with db:  # a savepoint, since a transaction is open
                head = int(db.execute(_HEAD, (append.episode_id,)).get)
                if append.expected_seq is not None and head != append.expected_seq:
                    raise SequenceConflict(f"the episode ends at {head}, not {append.expected_seq}")
                entries = number(append.episode_id, head, append.drafts, append.recorded_at)
                db.executemany(_INSERT, [to_row(entry) for entry in entries])
        except apsw.ConstraintError as error:
            raise SequenceConflict("an item id is already in the episode") from error
        return entries


def _library_version() -> int:
    major, minor, patch = (int(part) for part in apsw.sqlite_lib_version().split("."))
    return major * 1_000_000 + minor * 1_000 + patch


def _open_writer(path: Path) -> apsw.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    db = apsw.Connection(str(path))
    db.set_busy_timeout(_BUSY_MS)
    if db.execute("PRAGMA journal_mode = WAL").get != "wal":
        raise LogUnavailable(f"the file system of {path} does not support WAL")
    db.execute("PRAGMA synchronous = FULL")
    version = db.execute("PRAGMA user_version").get
    if version == 0:
        with db:
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version != SCHEMA_VERSION:
        db.close()
        raise LogUnavailable(
            f"log {path} has schema {version}, this version reads {SCHEMA_VERSION}"
        )
    return db


def _deliver(group: Sequence[_Append]) -> None:
    """Tell all callers of a group, and wake each of their loops once: a loop woken for the first
    would take the interpreter from this thread while the others wait.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[_Append]] = {}
    for append in group:
        by_loop.setdefault(append.loop, []).append(append)
    for loop, appends in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody is left to tell
            loop.call_soon_threadsafe(_resolve, appends)


def _resolve(appends: Sequence[_Append]) -> None:
    for append in appends:
        if append.future.done():  # its caller went away; the data is durable all the same
            continue
        if append.entries is not None:
            append.future.set_result(append.entries)
        else:
            append.future.set_exception(append.error or LogUnavailable("not written"))
