"""The audit trail while the service runs: a line is durable before its answer leaves.

Reads go on when the trail cannot be written, for a ward that cannot see its scores is worse off
than one whose lines are late. They wait in memory, in order, and are written when the log is well
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.log.base import EventLog, LogUnavailable
from service.trail.record import Action, AuditRecord

PATIENCE_S = 1.0
"""How long an answer waits for its line; after that the line waits in memory."""

MAX_WAITING = 10_000
"""Most lines in memory, about 1 KiB each."""

SAY_AGAIN_S = 60.0
"""How often the application's log tells of lines that are lost."""

_GROUP = 256
_TRY_AGAIN_S = 1.0
_FLUSH_S = 3.0

_logger = logging.getLogger(__name__)


class Trail:
    """Writes lines of the audit trail. Runs on one event loop."""

    def __init__(
        self,
        log: EventLog,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._clock = clock
        self._unsaid = 0
        """Lost lines of which the application's log does not tell yet."""
        self._said_at: float | None = None
        self._waiting: deque[AuditRecord] = deque()
        self._under_way: set[asyncio.Task[None]] = set()
        self._late = 0
        """Lines whose answers have left while the log still writes them."""
        self._wake = asyncio.Event()
        self._stopping = False
        self._behind: asyncio.Task[None] | None = None
        self._written = Counter(
            "llm4ehr_audit_records",
            "Lines of the audit trail that were written, besides those of writes",
            ["action"],
            registry=registry,
        )
        for action in get_args(Action):
            self._written.labels(action)
        Gauge(
            "llm4ehr_audit_waiting",
            "Lines of the audit trail that are only in memory, for the log is slow or unavailable",
            registry=registry,
        ).set_function(lambda: len(self._waiting) + self._late)
        self._lost = Counter(
            "llm4ehr_audit_lost",
            "Lines of the audit trail that are nowhere",
            registry=registry,
        )

    def start(self) -> None:
        """Begin to write what waits in memory."""
        self._behind = asyncio.create_task(self._catch_up())

    async def stop(self) -> None:
        """Write what waits, if the log takes it in some seconds. The log must still be open."""
        await _finish(self._under_way)  # what fails there waits in memory
        self._stopping = True
        self._wake.set()
        await _finish({self._behind} if self._behind is not None else set())
        if self._waiting:
            self._lose(len(self._waiting), "the log is unavailable at the end")
            self._waiting.clear()
        if self._unsaid:
            self._say("said at the end")

    async def write(self, record: AuditRecord) -> None:
        """Write a line: durable when this returns, unless the log is unavailable or slow."""
        if self._waiting or self._late:
            self._keep(record)
            return
        task = asyncio.create_task(self._write(record))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        # Whatever becomes of who waits here, the line is written.
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        if not done:
            self._late += 1
            task.add_done_callback(self._no_longer_late)

    def _no_longer_late(self, task: asyncio.Task[None]) -> None:
        self._late -= 1

    async def _write(self, record: AuditRecord) -> None:
        try:
            await self._log.record([record])
        except LogUnavailable:
            self._keep(record)
        except asyncio.CancelledError:
            self._lose(1, "the log was too slow at the end")
            raise
        except Exception as error:
            self._lose(1, type(error).__name__)
        else:
            self._written.labels(record.action).inc()

    def _keep(self, record: AuditRecord) -> None:
        if self._stopping or len(self._waiting) >= MAX_WAITING:
            self._lose(1, "no more can wait in memory")
            return
        if not self._waiting:
            _logger.warning("lines of the audit trail wait in memory: the log does not take them")
        self._waiting.append(record)
        self._wake.set()

    async def _catch_up(self) -> None:
        """Write what waits, in order, and try again while the log is unavailable.

        After a connection that broke it may write a line twice, which is better than not at all.
        """
        while not (self._stopping and not self._waiting):
            group = [self._waiting[i] for i in range(min(_GROUP, len(self._waiting)))]
            if not group:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await self._log.record(group)
            except LogUnavailable:
                if self._stopping:
                    return
                await self._pause()
                continue
            except Exception as error:
                self._lose(len(group), type(error).__name__)
            else:
                for record in group:
                    self._written.labels(record.action).inc()
            for _ in group:
                self._waiting.popleft()
            if not self._waiting:
                _logger.warning("no line of the audit trail waits in memory any more")

    async def _pause(self) -> None:
        """A moment, unless the service stops meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TRY_AGAIN_S):
                while not self._stopping:
                    self._wake.clear()
                    await self._wake.wait()

    def _lose(self, n: int, why: str) -> None:
        """Count lines that are lost, and say so, though not of each: there may be a great many."""
        self._lost.inc(n)
        self._unsaid += n
        now = self._clock()
        if self._said_at is None or now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            self._say(why)

    def _say(self, why: str) -> None:
        _logger.error("%d lines of the audit trail are lost: %s", self._unsaid, why)
        self._unsaid = 0


async def _finish(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for tasks as long as a stop may take, then end them."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=_FLUSH_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
