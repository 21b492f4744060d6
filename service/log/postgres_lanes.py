"""Connections to PostgreSQL that never keep anybody waiting for long, and are made again."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from service.log.base import LogUnavailable, Unconfirmed
from service.log.rows import AuditChain

Connection = psycopg.AsyncConnection[TupleRow]

CHANNEL = "llm4ehr_log"
"""Where replicas tell each other of episodes that changed: who tells, a space, the episode."""

PATIENCE_S = 6.0
"""After so long with a connection it is cut, whatever it waits for."""

# A cut network is noticed by the kernel, a dead server by its silence; what the URL says wins.
_CONNECT = {
    "connect_timeout": 3,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
    "target_session_attrs": "read-write",
    "fallback_application_name": "llm4ehr",
}

DURABLE = """
SELECT set_config('synchronous_commit', 'on', {local})
    WHERE current_setting('synchronous_commit') <> 'remote_apply'
"""
"""What is acknowledged must be on disk: a server or a role that says otherwise is overruled.
`remote_apply` waits for more, and stays. `local` is "true" for the transaction alone."""

_SESSION = f"""
{DURABLE.format(local="false")};
SET statement_timeout = '5s';
SET lock_timeout = '5s';
SET idle_in_transaction_session_timeout = '10s';
"""


class Busy(LogUnavailable):
    """Nothing is wrong with the log but that others use it."""


def parameters(url: str) -> dict[str, Any]:
    """What to connect with. Raises LogUnavailable for a URL that is none, without quoting it."""
    try:
        return _CONNECT | conninfo_to_dict(url)
    except psycopg.Error:
        raise LogUnavailable("LLM4EHR_LOG_URL is no URL of a PostgreSQL") from None


async def connect(how: dict[str, Any], also: LiteralString = "") -> Connection:
    """A connection that commits each statement by itself, after `also`.

    Raises psycopg.Error, after PATIENCE_S at the latest.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_S
    try:
        async with asyncio.timeout_at(deadline):
            # Prepared at the first use: each connection executes the same few statements again and
            # again.
            db = await psycopg.AsyncConnection.connect(**how, autocommit=True, prepare_threshold=0)
    except TimeoutError:
        raise psycopg.errors.ConnectionTimeout("the server does not answer") from None
    # Whoever cancels a statement waits for the server's answer: it is cut instead.
    timer = loop.call_at(deadline, _sever, db)
    try:
        await db.execute(_SESSION + also, prepare=False)
    except BaseException:
        await db.close()
        raise
    finally:
        timer.cancel()
    return db


def _sever(db: Connection) -> None:
    """Cut a connection beneath whatever waits for it, which then fails at once."""
    with (
        suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(db.pgconn.socket)) as connection,
    ):
        connection.shutdown(socket.SHUT_RDWR)


def is_lost(error: psycopg.Error) -> bool:
    """Whether an error is the end of the connection, and not the server's answer."""
    severity = error.diag.severity_nonlocalized
    return severity in (None, "FATAL", "PANIC") and isinstance(
        error, psycopg.OperationalError | psycopg.InterfaceError
    )


@dataclass(slots=True)
class Lane:
    """One connection, and the chain of the audit trail whose lines are written through it."""

    db: Connection
    used: bool = False
    """Whether something went through before: it may have been lost meanwhile."""
    severed: bool = False
    audit: AuditChain = field(default_factory=lambda: AuditChain(uuid.uuid4().hex))

    def sever(self) -> None:
        """Cut the connection beneath whatever waits for it, which then fails at once."""
        self.severed = True
        _sever(self.db)

    async def commit(self) -> None:
        """Raises Unconfirmed if the connection is lost meanwhile, psycopg.Error if it failed."""
        try:
            await self.db.execute("COMMIT")
        except psycopg.Error as error:
            if is_lost(error) or self.db.closed:
                raise Unconfirmed("the connection was lost during a commit") from None
            raise

    async def roll_back(self) -> None:
        """End a transaction that failed, if there is a connection left."""
        with suppress(psycopg.Error):
            if not self.is_idle():
                await self.db.execute("ROLLBACK")

    def is_idle(self) -> bool:
        """Whether it can be used for something else."""
        return not self.db.closed and self.db.info.transaction_status == TransactionStatus.IDLE


class Lanes:
    """So many connections at most, made when they are needed."""

    def __init__(self, url: str, most: int) -> None:
        self._how = parameters(url)
        self._free = asyncio.Semaphore(most)
        self._idle: list[Lane] = []
        self._closed = False

    @asynccontextmanager
    async def lane(self) -> AsyncIterator[Lane]:
        """A connection for this block alone. It is cut after PATIENCE_S.

        Raises psycopg.Error if there is none to be had, Busy if all are in use too long.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._free.acquire()
        except TimeoutError:
            raise Busy("all connections to the log are in use") from None
        try:
            lane = self._idle.pop() if self._idle else Lane(await connect(self._how))
            deadline = asyncio.get_running_loop().call_later(PATIENCE_S, lane.sever)
            try:
                yield lane
            finally:
                deadline.cancel()
                lane.used = True
                if lane.is_idle() and not self._closed:
                    self._idle.append(lane)
                else:
                    await lane.db.close()
        finally:
            self._free.release()

    async def drop_idle(self) -> None:
        """Keep no connection that is not in use: the server they lead to may be gone."""
        idle, self._idle = self._idle, []
        await _close(idle)

    async def close(self) -> None:
        """Close those that are idle, and each other one when its block ends."""
        self._closed = True
        await self.drop_idle()

    async def listen(self) -> Connection:
        """One more connection, for as long as one likes, that hears what replicas tell each other.

        Raises psycopg.Error.
        """
        return await connect(self._how, f"LISTEN {CHANNEL}")


async def _close(lanes: Iterable[Lane]) -> None:
    for lane in lanes:
        await lane.db.close()
