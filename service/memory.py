"""The episodes that are in memory. All of it is a cache of the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from service.entries import Entry
from service.log.base import EventLog, LogCorrupt
from service.state import EpisodeState, StateCache


class Memory:
    """Episodes as they are used, read from the log when they are not held.

    Where other processes write to the log as well, what is held of an episode is brought up to it
    each time before it is used.
    """

    def __init__(self, log: EventLog, max_entries: int) -> None:
        self._log = log
        self._cache = StateCache(max_entries)
        self.on_lost: Callable[[str], None] = lambda episode_id: None
        """Called with an episode of which the log does not have any more what was held."""

    async def load(self, episode_id: str, *, evict: bool = True) -> EpisodeState | None:
        """The state of an episode as it stands in the log; None if there is no such one.

        Without `evict` it makes nothing else leave the memory. Raises LogUnavailable, LogCorrupt.
        """
        state = self._cache.get(episode_id)
        if state is None or self._log.shared:
            return await self.look(episode_id, evict=evict)
        return state

    async def look(self, episode_id: str, *, evict: bool = True) -> EpisodeState | None:
        """The same, with a look at the log in any case."""
        state = self._cache.get(episode_id)
        if state is not None:
            # The last entry that is held comes again: it shows that the log still has it.
            last = state.entries[-1]
            entries = await self._log.entries(episode_id, last.seq - 1)
            if entries and entries[0][:-1] == last[:-1]:
                _take(state, entries)
                return self._cache.offer(state, evict=evict)
            # Its time to be kept is over, or the database went back to an earlier state.
            if self._cache.get(episode_id) is state:
                self._cache.drop(episode_id)
                self.on_lost(episode_id)
        entries = await self._log.entries(episode_id)
        return self._cache.offer(_state_of(entries), evict=evict) if entries else None

    async def reaching(self, episode_id: str, seq: int) -> EpisodeState | None:
        """What is held of an episode if it reaches as far as an entry, else what the log has."""
        state = self._cache.get(episode_id)
        return state if state is not None and state.seq >= seq else await self.look(episode_id)

    def offer(self, state: EpisodeState) -> EpisodeState:
        """Keep the fuller of this state and the one held; returns it."""
        return self._cache.offer(state)

    def drop(self, episode_id: str) -> None:
        """Keep nothing of an episode: it is read again when it is asked for."""
        self._cache.drop(episode_id)


def _state_of(entries: Sequence[Entry]) -> EpisodeState:
    """A new state of what the log holds. Raises LogCorrupt."""
    with _as_written():
        state = EpisodeState(entries)
        state.view  # noqa: B018 - it is read off the entries when it is asked for
        return state


def _take(state: EpisodeState, entries: Sequence[Entry]) -> None:
    """Add what the log holds to a state. Raises LogCorrupt."""
    with _as_written():
        state.extend(entries)
        state.view  # noqa: B018


@contextmanager
def _as_written() -> Iterator[None]:
    """Damage may make of an entry whatever it likes: raises LogCorrupt if it makes no episode."""
    try:
        yield
    except Exception as error:
        raise LogCorrupt("what the log holds makes no episode") from error
