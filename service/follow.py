"""Keeps the list and the scores of one replica up with what other replicas write.

Reads and decisions do not need it: they look at the log themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.log.base import EventLog, LogUnavailable
from service.memory import Memory
from service.models.manager import Models

_logger = logging.getLogger(__name__)

# What an episode is told of within this time is taken in once.
_DEBOUNCE_S = 0.05

# How long it waits for a log that cannot be read.
_LOG_PAUSE_S = 1.0

# The list is complete while nothing that this replica was told of waits for longer.
_LEVEL_S = 2.0


class Follower:
    """Listens to the changes of a shared log. In one that is not shared it does nothing."""

    def __init__(
        self, log: EventLog, memory: Memory, models: Models, registry: CollectorRegistry
    ) -> None:
        self._log = log
        self._memory = memory
        self._models = models
        self._waiting: dict[str, float] = {}  # since when each episode waits, the oldest first
        self._since: float | None = None  # the same of the one that is being taken in
        self._asked = self._compared = 0  # comparisons with the heads of the log
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._entries = Counter(
            "llm4ehr_followed_entries",
            "Entries that other replicas wrote and that this one took into its list",
            registry=registry,
        )
        self._skipped = Counter(
            "llm4ehr_follow_skipped",
            "Changed stays that could not be read, and were left out",
            registry=registry,
        )
        Gauge(
            "llm4ehr_follow_lag_seconds",
            "How long the oldest change that this replica was told of has waited",
            registry=registry,
        ).set_function(self.lag_seconds)

    def start(self) -> None:
        """Begin to follow."""
        if self._log.shared:
            self._asked += 1
            self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._follow())]

    async def stop(self) -> None:
        """End, and wait until nothing of it runs."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def level(self) -> bool:
        """Whether the list has all that this replica could know of."""
        return self._compared == self._asked and self.lag_seconds() < _LEVEL_S

    def lag_seconds(self) -> float:
        """How long the oldest change that is not taken in has waited; 0 if there is none."""
        since = self._since if self._since is not None else next(iter(self._waiting.values()), None)
        return 0.0 if since is None else time.monotonic() - since

    async def _listen(self) -> None:
        while True:
            try:
                async for episode_id in self._log.changes():
                    if episode_id is None:
                        self._asked += 1
                    else:
                        self._waiting.setdefault(episode_id, time.monotonic())
                    self._wake.set()
            except Exception as error:
                _logger.error("listening to the log failed: %s", type(error).__name__)
            self._asked += 1
            self._wake.set()
            await asyncio.sleep(_LOG_PAUSE_S)

    async def _follow(self) -> None:
        # Until then the catch-up reads everything anyway.
        await self._models.active.live.catch_up.seen.wait()
        while True:
            await self._wake.wait()
            await asyncio.sleep(_DEBOUNCE_S)
            self._wake.clear()
            try:
                await self._take_in()
                if self._compared < self._asked:
                    await self._compare()
            except LogUnavailable:
                self._wake.set()
                await asyncio.sleep(_LOG_PAUSE_S)
            except Exception as error:
                _logger.error("following the log failed: %s", type(error).__name__)
                self._wake.set()
                await asyncio.sleep(_LOG_PAUSE_S)

    async def _compare(self) -> None:
        """Find out what was missed. Raises LogUnavailable."""
        asked = self._asked
        heads = await self._log.heads()
        seen, now = self._models.active.live.seen, time.monotonic()
        for episode_id in heads.keys() | seen.keys():
            if heads.get(episode_id) != seen.get(episode_id):
                self._waiting.setdefault(episode_id, now)
        await self._take_in()
        self._compared = asked

    async def _take_in(self) -> None:
        """Take notice of all episodes that wait. Raises LogUnavailable."""
        while self._waiting:
            episode_id = next(iter(self._waiting))
            self._since = self._waiting.pop(episode_id)
            try:
                await self._notice(episode_id)
            except LogUnavailable:
                self._waiting = {episode_id: self._since} | self._waiting
                raise
            except Exception as error:
                # A stay that is damaged holds no other up.
                self._skipped.inc()
                _logger.error("a changed stay cannot be read: %s", type(error).__name__)
            finally:
                self._since = None

    async def _notice(self, episode_id: str) -> None:
        state = await self._memory.load(episode_id, evict=False)
        seen = self._models.active.live.seen.get(episode_id, 0)
        if state is None or state.seq < seen:
            # Its time to be kept is over, or the database went back to an earlier state.
            self._models.forget(episode_id)
        if state is not None:
            self._entries.inc(max(state.seq - seen, 0))
            self._models.changed(state, urgent=False)
