"""The log in PostgreSQL, shared by several replicas of the service.

An append is one short transaction: read where the episode ends, insert what follows. Nothing is
locked for it. The primary key is the fence: of two that insert the same number one fails. Those
that commit tell the others by NOTIFY.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import ClassVar, LiteralString, TypeVar

import psycopg

from service.entries import Draft, Entry
from service.log.base import EventLog, LogUnavailable, Retired, SequenceConflict, Unconfirmed
from service.log.migrate import RETIRED_STATE, WrongSchema, require_known
from service.log.postgres_lanes import CHANNEL, Busy, Connection, Lane, Lanes, is_lost
from service.log.rows import FIRST, Row, from_rows, number, require_chain, to_rows
from service.trail.record import AuditRecord

_logger = logging.getLogger(__name__)

CONNECTIONS = 8
"""Most connections of one replica, besides the one that listens."""

START_S = 30.0
"""How long a server that does not answer yet is waited for at the start."""

_TRY_AGAIN_S = 3.0

_HEAD = "SELECT seq, hash FROM log WHERE episode_id = %s ORDER BY seq DESC LIMIT 1"
# One statement for any number of rows, each column as an array.
_INSERT = """
INSERT INTO log SELECT * FROM unnest(
    %s::text[], %s::bigint[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[],
    %s::text[], %s::text[], %s::bytea[])
"""
_INSERT_AUDIT = """
INSERT INTO audit SELECT * FROM unnest(
    %s::text[], %s::bigint[], %s::bigint[], %s::text[], %s::bytea[])
"""
_NOTIFY = f"SELECT pg_notify('{CHANNEL}', %s)"
_ENTRIES = """
SELECT seq, kind, item_id, effective_at, available_at, recorded_at, target, payload
FROM log WHERE episode_id = %s AND seq > %s ORDER BY seq
"""
_ROWS = "SELECT * FROM log WHERE episode_id = %s ORDER BY seq"
# Steps from one episode to the next through the primary key instead of reading every row, so many
# at a time: no statement may run longer than a moment.
_HEADS_OF_PAGE = """
WITH RECURSIVE head AS (
    (SELECT episode_id, seq, recorded_at FROM log {where}
     ORDER BY episode_id DESC, seq DESC LIMIT 1)
    UNION ALL
    SELECT next.* FROM head, LATERAL (
        SELECT episode_id, seq, recorded_at FROM log WHERE episode_id < head.episode_id
        ORDER BY episode_id DESC, seq DESC LIMIT 1
    ) AS next
)
SELECT episode_id, seq, recorded_at FROM head LIMIT %s
"""
_FIRST_HEADS = _HEADS_OF_PAGE.format(where="")
_NEXT_HEADS = _HEADS_OF_PAGE.format(where="WHERE episode_id < %s")
_HEADS_AT_A_TIME = 10_000
_SCHEMA = """
SELECT current_setting('server_encoding'), current_setting('fsync'),
       to_regclass('alembic_version') IS NOT NULL
"""
# Writes to the server's own log of changes, and to no table.
_TRIAL = "SELECT pg_logical_emit_message(true, 'llm4ehr', 'trial')"

_T = TypeVar("_T")


class PostgresLog(EventLog):
    """A log in the PostgreSQL of a `postgresql://` URL, whose schema was made before.

    Raises LogUnavailable if it is no such URL.
    """

    shared: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self._lanes = Lanes(url, CONNECTIONS)
        self._writer = uuid.uuid4().hex
        self._well = True
        self._ill = asyncio.Event()
        self._closed = False
        self._unconfirmed: set[str] = set()
        """Episodes with a write that may still go through, and be the only one to know of."""
        self._running: set[asyncio.Task[object]] = set()
        self._trial: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Wait for the server, START_S at most. Raises LogUnavailable, WrongSchema."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                await self._use(_check_schema)
                break
            except WrongSchema:
                await self._lanes.close()
                raise
            except LogUnavailable:
                if time.monotonic() > deadline:
                    await self._lanes.close()
                    raise
            await asyncio.sleep(1)
        self._trial = asyncio.create_task(self._try_again())

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

        async def write(lane: Lane) -> list[Entry]:
            async with lane.db.pipeline():
                await lane.db.execute("BEGIN")
                cursor = await lane.db.execute(_HEAD, (episode_id,))
            head, previous = await cursor.fetchone() or (0, FIRST)
            if expected_seq is not None and head != expected_seq:
                raise SequenceConflict(f"the episode ends at {head}, not {expected_seq}")
            entries = number(episode_id, head, drafts, recorded_at)
            rows = to_rows(entries, previous)
            lines, audit = lane.audit.to_rows([] if record is None else [record])
            async with lane.db.pipeline():
                await lane.db.execute(_INSERT, _columns(rows))
                if lines:
                    await lane.db.execute(_INSERT_AUDIT, _columns(lines))
                await lane.db.execute(_NOTIFY, (f"{self._writer} {episode_id}",))
            try:
                await lane.commit()
            except Unconfirmed:
                self._unconfirmed.add(episode_id)
                raise
            lane.audit = audit
            return entries

        return await self._write(write)

    async def record(self, records: Sequence[AuditRecord]) -> None:
        if not records:
            return

        async def write(lane: Lane) -> None:
            lines, audit = lane.audit.to_rows(records)
            async with lane.db.pipeline():
                await lane.db.execute("BEGIN")
                await lane.db.execute(_INSERT_AUDIT, _columns(lines))
            await lane.commit()
            lane.audit = audit

        await self._write(write)

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        rows = await self._read(_ENTRIES, episode_id, after_seq)
        return await asyncio.to_thread(from_rows, episode_id, after_seq, rows)

    async def verify(self, episode_id: str) -> None:
        await asyncio.to_thread(require_chain, await self._read(_ROWS, episode_id))

    async def heads(self) -> dict[str, int]:
        page = heads = await self._read(_FIRST_HEADS, _HEADS_AT_A_TIME)
        while len(page) == _HEADS_AT_A_TIME:
            page = await self._read(_NEXT_HEADS, page[-1][0], _HEADS_AT_A_TIME)
            heads += page
        # By code points, which is also the order of the bytes of UTF-8.
        heads.sort(key=lambda head: (-head[2], head[0]))
        return {episode_id: seq for episode_id, seq, _ in heads}

    async def changes(self) -> AsyncIterator[str | None]:
        while not self._closed:
            try:
                db = await self._lanes.listen()
            except psycopg.Error:
                await asyncio.sleep(1)
                continue
            try:
                yield None
                async for notice in db.notifies():
                    writer, _, episode_id = notice.payload.partition(" ")
                    if writer != self._writer:
                        yield episode_id
                    elif episode_id in self._unconfirmed:
                        self._unconfirmed.discard(episode_id)
                        yield episode_id
            except psycopg.Error:
                yield None  # at once as well: who follows is to know that it does not hear
                await asyncio.sleep(1)
            finally:
                await db.close()

    def available(self) -> bool:
        return self._well and not self._closed

    async def close(self) -> None:
        self._closed = True
        if self._trial is not None:
            self._trial.cancel()
            await asyncio.wait([self._trial])
        if self._running:
            await asyncio.wait(self._running)
        await self._lanes.close()

    async def _read(self, query: LiteralString, *values: object) -> list[Row]:
        async def read(lane: Lane) -> list[Row]:
            return await (await lane.db.execute(query, values)).fetchall()

        return await self._use(read)

    async def _write(self, work: Callable[[Lane], Awaitable[_T]]) -> _T:
        async def whole(lane: Lane) -> _T:
            try:
                return await work(lane)
            except BaseException:
                await lane.roll_back()
                raise

        try:
            result = await self._use(whole)
        except Busy:
            raise
        except LogUnavailable:
            self._well = False
            self._ill.set()
            raise
        self._well = True
        return result

    async def _use(self, work: Callable[[Lane], Awaitable[_T]]) -> _T:
        """Do something with a connection, to its end even if the caller goes away.

        Raises SequenceConflict, Retired, LogUnavailable, Unconfirmed.
        """
        if self._closed:
            raise LogUnavailable("the log is closed")
        task = asyncio.create_task(self._translated(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # Of a failure that nobody waits for any more there is nothing to say.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(task)

    async def _translated(self, work: Callable[[Lane], Awaitable[_T]]) -> _T:
        """The driver's errors as ours. Their texts are dropped: they may quote values."""
        try:
            return await self._with_lane(work)
        except psycopg.errors.UniqueViolation:
            raise SequenceConflict("somebody else wrote to the episode") from None
        except psycopg.errors.LockNotAvailable:
            raise Busy("a command has the log for itself") from None
        except psycopg.Error as error:
            if error.sqlstate == RETIRED_STATE:
                raise Retired("the time to keep the episode is over") from None
            name = type(error).__name__
            raise LogUnavailable(f"the log cannot be read or written: {name}") from None

    async def _with_lane(self, work: Callable[[Lane], Awaitable[_T]]) -> _T:
        """Once more, with a new connection, if one that had been idle turns out to be lost."""
        stale = False
        try:
            async with self._lanes.lane() as lane:
                was_used = lane.used
                try:
                    return await work(lane)
                finally:
                    stale = was_used and not lane.severed
        except psycopg.Error as error:
            if not is_lost(error) and not isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                raise
            await self._lanes.drop_idle()
            if not stale:
                raise
        async with self._lanes.lane() as lane:
            return await work(lane)

    async def _try_again(self) -> None:
        """Find out when an unavailable log is well again, while nobody may write."""
        while True:
            await self._ill.wait()
            self._ill.clear()
            while not self._well:
                await asyncio.sleep(_TRY_AGAIN_S)
                with suppress(LogUnavailable):
                    await self._use(_try)
                    self._well = True


async def _try(lane: Lane) -> None:
    await lane.db.execute(_TRIAL)


async def _check_schema(lane: Lane) -> None:
    """Raises WrongSchema, LogUnavailable."""
    require_known(await _revision(lane.db))


async def _revision(db: Connection) -> str | None:
    encoding, fsync, has_schema = await (await db.execute(_SCHEMA)).fetchone() or ("", "", False)
    if encoding != "UTF8":
        raise WrongSchema("the database of the log must have the encoding UTF8")
    if fsync != "on":
        raise WrongSchema("the PostgreSQL of the log has fsync off: it would lose entries")
    if not has_schema:
        return None
    row = await (await db.execute("SELECT version_num FROM alembic_version")).fetchone()
    return None if row is None else str(row[0])


def _columns(rows: Sequence[Row]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
