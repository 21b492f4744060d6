"""Stays that are scored without anybody asking: the open ones after a start, then those behind.

So many at a time as fill a tick, so that whoever asks waits for few others; those that were written
to last come first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from types import NoneType
from typing import Protocol

from service.core import EngineStopped, Scores
from service.log.base import EventLog, LogUnavailable
from service.state import EpisodeState

_logger = logging.getLogger(__name__)

# How long it waits before it asks again, for the engine and for the log.
_ENGINE_PAUSE_S = 0.05
_LOG_PAUSE_S = 1.0


class Load(Protocol):
    """Loads an episode's state; without `evict` it makes nothing else leave the memory."""

    def __call__(
        self, episode_id: str, *, evict: bool = True
    ) -> Awaitable[EpisodeState | None]: ...


class Asks(Protocol):
    """Who has stays scored."""

    def note(self, state: EpisodeState) -> None:
        """Take notice of what an episode is now."""
        ...

    def lacks(self, state: EpisodeState) -> bool:
        """Whether an episode can be scored and has not the scores of its last entry."""
        ...

    def ask(self, state: EpisodeState) -> asyncio.Future[Scores] | bool:
        """Submit it, unless it is under way; False if the engine has no room now, True if it takes
        nothing.
        """
        ...


class CatchUp:
    """A task beside the requests, for one model."""

    def __init__(self, asks: Asks, load: Load, log: EventLog, at_a_time: int) -> None:
        self._asks = asks
        self._load = load
        self._log = log
        self._at_a_time = at_a_time
        self._in_flight: set[asyncio.Future[Scores]] = set()
        self._behind: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.seen = asyncio.Event()
        """Set once every episode in the log has been seen."""
        self.warm = asyncio.Event()
        """Set once every stay that was open at the start has its scores, and so have those written
        to meanwhile, but for the last moments."""
        self.to_score, self.n_scored = 0, 0
        """Stays to look at after the start, and those that are done."""
        self.n_failed, self.n_unread = 0, 0
        """How often a stay could not be scored since the start, and how often not be read."""

    def start(self, take_over: Callable[[], Awaitable[list[str]]] | None) -> None:
        """Begin with what is in the log, or with the open stays that `take_over` gives."""
        self._task = asyncio.create_task(self._run(take_over))
        self._task.add_done_callback(_report)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @property
    def n_behind(self) -> int:
        """Stays that were written to and wait to be scored."""
        return len(self._behind)

    @property
    def ended(self) -> bool:
        """Whether it was started and runs no more, for whatever reason."""
        return self._task is not None and self._task.done()

    async def finished(self) -> bool:
        """Wait until it is warm, or has ended; whether it is warm."""
        assert self._task is not None
        warm = asyncio.create_task(self.warm.wait())
        try:
            await asyncio.wait([warm, self._task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            warm.cancel()
        return self.warm.is_set()

    async def stop(self) -> None:
        """Cancel, and wait until nothing of it runs."""
        self.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])

    def leave_behind(self, episode_id: str) -> None:
        """Have a stay scored when those before it are."""
        self._behind[episode_id] = None
        self._wake.set()

    async def _run(self, take_over: Callable[[], Awaitable[list[str]]] | None) -> None:
        if take_over is None:
            await self._read_log()
        else:
            episode_ids = await take_over()
            del take_over  # the model it takes over from may be unloaded long before this one
            self.to_score = len(episode_ids)
            self.seen.set()
            await self._score(iter(episode_ids), self._count)
        await self._all_answered()
        # Those that were written to meanwhile.
        await self._score(self._oldest_behind(), lambda: None)
        await self._all_answered()
        self.warm.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._score(self._oldest_behind(), lambda: None)

    def _count(self) -> None:
        self.n_scored += 1

    def _oldest_behind(self) -> Iterator[str]:
        while self._behind:
            episode_id = next(iter(self._behind))
            del self._behind[episode_id]
            yield episode_id

    async def _read_log(self) -> None:
        """See every episode, and score the open ones as fast as the engine takes them.

        Seeing does not wait for the engine: the list of stays is soon complete. What the memory has
        no room for meanwhile is read again.
        """
        episode_ids = await self._all_episodes()
        self.to_score = len(episode_ids)
        open_: deque[str] = deque()
        for episode_id in episode_ids:
            state = await self._see(episode_id)
            if state is not None and state.view.discharged_at is None:
                open_.append(episode_id)
            else:
                self._count()
            while open_ and self._has_room():
                await self._revisit(open_.popleft(), self._count)
        self.seen.set()
        await self._score(iter(open_), self._count)

    async def _all_episodes(self) -> list[str]:
        while True:
            try:
                return list(await self._log.heads())
            except LogUnavailable:
                _logger.warning("the log cannot be read; trying again")
                await asyncio.sleep(_LOG_PAUSE_S)

    async def _all_answered(self) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight)

    def _has_room(self) -> bool:
        self._in_flight = {future for future in self._in_flight if not future.done()}
        return len(self._in_flight) < self._at_a_time

    async def _score(self, episode_ids: Iterator[str], done: Callable[[], None]) -> None:
        """Have stays scored, so many at a time; the last of them are under way at the end."""
        for episode_id in episode_ids:
            while not self._has_room():
                await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            await self._revisit(episode_id, done)

    async def _see(self, episode_id: str) -> EpisodeState | None:
        """Take notice of a stay; returns it if it has not the scores of its last entry.

        One that cannot be read is counted, and holds no other up.
        """
        while True:
            try:
                state = await self._load(episode_id, evict=False)
                if state is None:
                    return None
                self._asks.note(state)
                return state if self._asks.lacks(state) else None
            except LogUnavailable:
                await asyncio.sleep(_LOG_PAUSE_S)
            except Exception as error:
                _logger.error("a stay cannot be caught up with: %s", type(error).__name__)
                self.n_unread += 1
                return None

    async def _revisit(self, episode_id: str, done: Callable[[], None]) -> None:
        """Have a stay scored if it lacks its scores, and call `done` when it has them."""
        while True:
            state = await self._see(episode_id)
            if state is None:
                done()
                return
            asked = self._asks.ask(state)
            if isinstance(asked, asyncio.Future):
                asked.add_done_callback(lambda future: self._answered(future, done))
                self._in_flight.add(asked)
                return
            if asked:
                done()
                return
            await asyncio.sleep(_ENGINE_PAUSE_S)

    def _answered(self, future: asyncio.Future[Scores], done: Callable[[], None]) -> None:
        # A stopped engine shows in its health; a stay that was forgotten is no failure.
        if not future.cancelled() and not isinstance(future.exception(), EngineStopped | NoneType):
            self.n_failed += 1
        done()


def _report(task: asyncio.Task[None]) -> None:
    """Without this a failure would stay unseen: nobody waits for the catch-up."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("the catch-up failed: %s", type(error).__name__)
