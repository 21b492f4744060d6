"""A log in memory that several replicas share, as slow and as unreliable as a test likes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from random import Random
from typing import ClassVar, Literal

from pydantic_core import from_json

from service.entries import Draft, Entry, to_json
from service.log.base import (
    EventLog,
    LogCorrupt,
    LogUnavailable,
    Retired,
    SequenceConflict,
    Unconfirmed,
)
from service.log.rows import number
from service.trail.record import AuditRecord

Fault = Literal["recorded", "not recorded", "unavailable"]
"""The confirmation of an append is lost, recorded or not; or it fails and says so."""


class Store:
    """What the replicas have in common. Appends to it happen at once and in one order."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Entry]] = {}
        self.order: dict[str, None] = {}  # written to last comes last
        self.corrupt: set[str] = set()
        self.retired: set[str] = set()
        self.lines: list[AuditRecord] = []
        self.listeners: dict[SharedLog, asyncio.Queue[str | None]] = {}

    def retire(self, episode_id: str) -> None:
        """Remove an episode; nobody is told."""
        self.retired.add(episode_id)
        del self.entries[episode_id], self.order[episode_id]

    def put(self, drafts: Sequence[Draft], entries: list[Entry]) -> None:
        """Raises SequenceConflict if an item is there already."""
        episode_id = entries[0].episode_id
        held = self.entries.get(episode_id, [])
        ids = {e.item_id for e in held if e.item_id is not None}
        if ids & {d.item_id for d in drafts}:
            raise SequenceConflict("an item is there already")
        # As a database gives them back, not the objects that came in.
        stored = [e._replace(payload=from_json(to_json(e.payload))) for e in entries]
        self.entries[episode_id] = held + stored
        self.order.pop(episode_id, None)
        self.order[episode_id] = None


class SharedLog(EventLog):
    """One replica's way to a store. Each step takes some turns of the loop, at random."""

    shared: ClassVar[bool] = True

    def __init__(self, store: Store, random: Random, *, most_turns: int = 4) -> None:
        self.store = store
        self.faults: deque[Fault] = deque()
        """What becomes of the next appends."""
        self.cut = False
        """Nothing comes through, either way."""
        self.looks = 0
        self._random = random
        self._most_turns = most_turns

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        self.store.listeners.pop(self, None)

    def available(self) -> bool:
        return not self.cut

    async def append(
        self,
        episode_id: str,
        drafts: Sequence[Draft],
        recorded_at: datetime,
        expected_seq: int | None,
        record: AuditRecord | None = None,
    ) -> list[Entry]:
        await self._turns()
        fault = self.faults.popleft() if self.faults else None
        if fault == "unavailable":
            raise LogUnavailable("no connection")
        if fault == "not recorded":
            raise Unconfirmed("lost")
        if episode_id in self.store.retired:
            raise Retired
        head = len(self.store.entries.get(episode_id, []))
        if expected_seq is not None and head != expected_seq:
            raise SequenceConflict("somebody else wrote")
        entries = number(episode_id, head, drafts, recorded_at)
        self.store.put(drafts, entries)
        self.store.lines += [] if record is None else [record]
        for log, queue in self.store.listeners.items():
            if log is not self and not log.cut:
                queue.put_nowait(episode_id)
        await self._turns()
        if fault == "recorded" or self.cut:
            raise Unconfirmed("lost")
        return entries

    async def entries(self, episode_id: str, after_seq: int = 0) -> list[Entry]:
        self.looks += 1
        await self._turns()
        if episode_id in self.store.corrupt:
            raise LogCorrupt("not what was written")
        found = self.store.entries.get(episode_id, [])[after_seq:]
        await self._turns()
        return found

    async def verify(self, episode_id: str) -> None:
        await self.entries(episode_id)

    async def heads(self) -> dict[str, int]:
        await self._turns()
        return {name: len(self.store.entries[name]) for name in reversed(self.store.order)}

    async def changes(self) -> AsyncIterator[str | None]:
        queue = self.store.listeners[self] = asyncio.Queue()
        queue.put_nowait(None)
        while True:
            yield await queue.get()

    async def record(self, records: Sequence[AuditRecord]) -> None:
        await self._turns()
        self.store.lines += records

    def mend(self) -> None:
        """Let everything through again; who listens is told that something may be missed."""
        self.cut = False
        self.store.listeners[self].put_nowait(None)

    async def _turns(self) -> None:
        for _ in range(self._random.randint(0, self._most_turns)):
            await asyncio.sleep(0)
        if self.cut:
            raise LogUnavailable("no connection")
