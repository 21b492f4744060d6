"""The episodes that are in memory. All of it is a cache of the log."""

from __future__ import annotations

from service.log.base import EventLog
from service.state import EpisodeState, StateCache


class Memory:
    """Episodes as they are used, read from the log when they are not held."""

    def __init__(self, log: EventLog, max_entries: int) -> None:
        self._log = log
        self._cache = StateCache(max_entries)

    async def load(self, episode_id: str, *, evict: bool = True) -> EpisodeState | None:
        """The state of an episode; None if there is no such one. Raises LogUnavailable.

        Without `evict` it makes nothing else leave the memory.
        """
        state = self._cache.get(episode_id)
        if state is None:
            entries = await self._log.entries(episode_id)
            if not entries:
                return None
            state = self._cache.offer(EpisodeState(entries), evict=evict)
        return state

    def offer(self, state: EpisodeState) -> EpisodeState:
        """Keep the fuller of this state and the one held; returns it."""
        return self._cache.offer(state)

    def drop(self, episode_id: str) -> None:
        """Keep nothing of an episode: it is read again when it is asked for."""
        self._cache.drop(episode_id)
