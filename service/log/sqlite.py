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
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeVar

import apsw

from service.entries import Draft, Entry
from service.log.base import (
    EventLog,
    LogCorrupt,
    LogUnavailable,
    Retired,
    SequenceConflict,
    Unconfirmed,
)
from service.log.migrate import USER_VERSION
from service.log.rows import FIRST, AuditChain, from_rows, number, require_chain, to_rows
from service.log.sqlite_file import FileLock, OpenFiles, open_reader, open_writer, real
from service.trail.record import AuditRecord

MAX_GROUP = 256
"""Writes in one transaction; bounds how long the first of them waits for the last."""

# How often a log that could not be written is tried again while nobody writes.
_TRY_AGAIN_S = 5.0

# Under a savepoint each statement costs as much as several rows, so rows go in together; SQLite
# takes no more than 32,766 values in one.
_ROWS_AT_A_TIME = 256
_INSERT_AUDIT = "INSERT INTO audit VALUES (?, ?, ?, ?, ?)"
_HEAD = "SELECT seq, hash FROM log WHERE episode_id = ? ORDER BY seq DESC LIMIT 1"
_RETIRED = "SELECT EXISTS (SELECT 1 FROM retired WHERE episode_id = ?)"
_ENTRIES = """
SELECT seq, kind, item_id, effective_at, available_at, recorded_at, target, payload
FROM log WHERE episode_id = ? AND seq > ? ORDER BY seq
"""
_ROWS = "SELECT * FROM log WHERE episode_id = ? ORDER BY seq"
# Steps from one episode to the next through the primary key instead of reading every row.
_HEADS = """
WITH RECURSIVE episode (id) AS (
    SELECT min(episode_id) FROM log
    UNION ALL
    SELECT (SELECT min(episode_id) FROM log WHERE episode_id > episode.id)
    FROM episode WHERE episode.id IS NOT NULL
),
head (id, seq) AS (
    SELECT id, (SELECT max(seq) FROM log WHERE episode_id = id) FROM episode WHERE id IS NOT NULL
)
SELECT head.id, head.seq FROM head JOIN log ON log.episode_id = head.id AND log.seq = head.seq
ORDER BY log.recorded_at DESC, head.id
"""

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class _Write:
    """One call of `append` or `record` on its way to the writer, and what came of it."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Entry]]
    records: Sequence[AuditRecord]
    episode_id: str = ""
    drafts: Sequence[Draft] = ()
    recorded_at: datetime | None = None
    expected_seq: int | None = None
    entries: list[Entry] | None = None
    error: Exception | None = None


class SqliteLog(EventLog):
    """A log in the file `path`, made if it does not exist, and brought to this version's schema.

    Raises LogUnavailable if another process has the log, if the SQLite library is too old, or the
    file cannot be opened or has a schema that is not known.
    """

    shared: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        path = real(path)
        with contextlib.ExitStack() as undo:
            self._lock = FileLock(path)
            undo.callback(self._lock.release)
            self._writer = open_writer(path)
            undo.callback(self._writer.close)
            self._reader = open_reader(path)
            undo.callback(self._reader.close)
            self._files = OpenFiles(path)
            undo.pop_all()
        self._audit = AuditChain(uuid.uuid4().hex)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._available = True
        self._closed = False
        self._read_pool = ThreadPoolExecutor(1, thread_name_prefix="log-read")
        self._thread = threading.Thread(target=self._write_loop, name="log-write", daemon=True)
        self._thread.start()

    async def open(self) -> None:
        """Nothing is left to do: the file is open."""

    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
        record: AuditRecord | None = None,
    ) -> list[Entry]:
        if not drafts:
            raise ValueError("nothing to append")
        loop = asyncio.get_running_loop()
        return await self._put(
            _Write(
                loop=loop,
                future=loop.create_future(),
                records=() if record is None else (record,),
                episode_id=episode_id,
                drafts=drafts,
                recorded_at=recorded_at,
                expected_seq=expected_seq,
            )
        )

    async def record(self, records: Sequence[AuditRecord]) -> None:
        loop = asyncio.get_running_loop()
        await self._put(_Write(loop=loop, future=loop.create_future(), records=records))

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        return await self._read(
            lambda db: from_rows(
                episode_id, after_seq, db.execute(_ENTRIES, (episode_id, after_seq)).fetchall()
            )
        )

    async def verify(self, episode_id: str) -> None:
        await self._read(lambda db: require_chain(db.execute(_ROWS, (episode_id,))))

    async def heads(self) -> dict[str, int]:
        rows = await self._read(lambda db: db.execute(_HEADS).fetchall())
        return {str(episode_id): int(str(seq)) for episode_id, seq in rows}

    async def changes(self) -> AsyncIterator[str | None]:
        others: tuple[str, ...] = ()  # no other process writes
        for episode_id in others:
            yield episode_id

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
        self._lock.release()

    async def _put(self, write: _Write) -> list[Entry]:
        if self._closed:
            raise LogUnavailable("the log is closed")
        self._queue.put(write)
        return await write.future

    async def _read(self, query: Callable[[apsw.Connection], _T]) -> _T:
        if self._closed:
            raise LogUnavailable("the log is closed")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._read_pool, query, self._reader)
        except (apsw.CorruptError, UnicodeDecodeError) as error:
            raise LogCorrupt("the log cannot be read") from error
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
            _deliver([write for write in late if write is not None])

    def _next(self) -> _Write | None:
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
            self._files.require()
            self._writer.execute(f"PRAGMA user_version = {USER_VERSION}")
            self._available = True

    def _fill(self, group: list[_Write]) -> bool:
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

    def _commit(self, group: Sequence[_Write]) -> None:
        """Write a group in one transaction. Entries are handed out only once it is durable."""
        db, audit = self._writer, self._audit
        written: list[tuple[_Write, list[Entry]]] = []
        committing = False
        try:
            self._files.require()
            db.execute("BEGIN IMMEDIATE")
            for write in group:
                try:
                    entries, audit = self._write_one(write, audit)
                    written.append((write, entries))
                except (Retired, SequenceConflict, TypeError, ValueError) as error:
                    write.error = error
            committing = True
            db.execute("COMMIT")
        except (apsw.Error, OSError, MemoryError) as error:
            self._available = False
            for write in group:
                write.error = LogUnavailable(f"cannot write the log: {type(error).__name__}")
                write.error.__cause__ = error
            if committing and isinstance(error, apsw.IOError):
                # It may stand in the WAL whole: if the process ends now, it is recorded.
                for write, _ in written:
                    write.error = Unconfirmed("the disk failed during a commit")
                    write.error.__cause__ = error
            if db.in_transaction:
                db.execute("ROLLBACK")
            return
        self._available = True
        self._audit = audit
        for write, entries in written:
            write.entries = entries

    def _write_one(self, write: _Write, audit: AuditChain) -> tuple[list[Entry], AuditChain]:
        """One write under a savepoint, so that its failure leaves its neighbours alone.

        Errors of the disk concern the whole transaction and pass through.
        """
        db = self._writer
        try:
            with db:  # a savepoint, since a transaction is open
                entries = [] if write.recorded_at is None else self._insert(write)
                lines, audit = audit.to_rows(write.records)
                db.executemany(_INSERT_AUDIT, lines)
        except apsw.ConstraintError as error:
            if write.recorded_at is None:
                raise  # nothing of a client can be in conflict there
            if db.execute(_RETIRED, (write.episode_id,)).get:
                raise Retired("the time to keep the episode is over") from error
            raise SequenceConflict("an item id is already in the episode") from error
        return entries, audit

    def _insert(self, write: _Write) -> list[Entry]:
        db = self._writer
        assert write.recorded_at is not None
        head, previous = db.execute(_HEAD, (write.episode_id,)).fetchone() or (0, FIRST)
        if write.expected_seq is not None and head != write.expected_seq:
            raise SequenceConflict(f"the episode ends at {head}, not {write.expected_seq}")
        entries = number(write.episode_id, head, write.drafts, write.recorded_at)
        rows = to_rows(entries, previous)
        for first in range(0, len(rows), _ROWS_AT_A_TIME):
            some = rows[first : first + _ROWS_AT_A_TIME]
            places = ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * len(some))
            db.execute(f"INSERT INTO log VALUES {places}", list(chain.from_iterable(some)))
        return entries


def _deliver(group: Sequence[_Write]) -> None:
    """Tell all callers of a group, and wake each of their loops once: a loop woken for the first
    would take the interpreter from this thread while the others wait.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[_Write]] = {}
    for write in group:
        by_loop.setdefault(write.loop, []).append(write)
    for loop, writes in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a closed loop: nobody is left to tell
            loop.call_soon_threadsafe(_resolve, writes)


def _resolve(writes: Sequence[_Write]) -> None:
    for write in writes:
        if write.future.done():  # its caller went away; the data is durable all the same
            continue
        if write.entries is not None:
            write.future.set_result(write.entries)
        else:
            write.future.set_exception(write.error or LogUnavailable("not written"))
