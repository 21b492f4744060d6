"""The application between the API, the log and the engine: what may be done with an episode."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from llm4ehr.preprocessing import Statics
from service import decisions, timing
from service.access.principal import Forbidden, Visit
from service.core import Draft, EpisodeView, entries_as_of, episode_at, to_us
from service.decisions import (
    Admission,
    Change,
    DeletedEpisode,
    Posted,
    Refused,
    UnknownEpisode,
)
from service.ingest import Batch, Rules
from service.live import LiveScores
from service.log.base import EventLog, LogUnavailable, Retired, SequenceConflict, Unconfirmed
from service.memory import Memory
from service.models.manager import Models
from service.settings import Settings
from service.state import EpisodeState, Scored
from service.trail.record import Action, record_of

_T = TypeVar("_T")

# A decision: what to write, and the outcome to report, judged from the state and the time.
_Decide = Callable[[EpisodeState | None, datetime], tuple[Sequence[Draft], _T]]

# How often a write is judged again where nobody else should write; where others do, there is no
# limit but the deadline.
_MAX_CONFLICTS = 5

_ITEMS = {"observation", "event", "withdrawal"}

# Between two tries a random time up to this, doubled with each, up to the longest.
_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


class SeqNotReached(Exception):
    """The log does not hold that many entries of the episode."""


class TooManyWrites(Exception):
    """As many writes as may be are under way. Nothing was recorded; ask again later."""


class NotConfirmed(Exception):
    """The log takes too long. The write goes on; sending it again finds out what became of it."""


class EpisodeService:
    """Reads and writes episodes. Runs on one event loop; what it acknowledges is in the log.

    Every write may raise Forbidden, TooManyWrites, NotConfirmed and LogCorrupt besides what it
    names. A stay that a client may not see does not exist for it.
    """

    def __init__(
        self,
        *,
        log: EventLog,
        memory: Memory,
        models: Models,
        settings: Settings,
        clock: Callable[[], datetime],
        on_commit: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._log = log
        self._memory = memory
        self._models = models
        self._settings = settings
        self._clock = clock
        self._on_commit = on_commit
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._writes: set[asyncio.Task[Any]] = set()
        self._max_writes = settings.max_waiting_writes
        self._write_s = settings.write_deadline_seconds

    def start(self) -> None:
        """Begin to score the open stays that are in the log."""
        self._models.start()

    async def stop(self) -> None:
        """Finish the writes under way; the log can be closed afterwards."""
        if self._writes:
            await asyncio.wait(self._writes)
        await self._models.stop()

    @property
    def waiting_writes(self) -> int:
        """Writes that are not in the log yet."""
        return len(self._writes)

    async def post(
        self, visit: Visit, episode_id: str, batch: Batch, admission: Admission | None
    ) -> tuple[int, Posted]:
        """Record the good items of a batch; creates the episode if its admission is given.

        Returns the episode's last sequence number too. Raises UnknownEpisode, DeletedEpisode,
        Refused, NothingAccepted, LogUnavailable.
        """
        _require_admissible(visit, admission)
        state, posted = await self._write(
            visit,
            episode_id,
            lambda state, now: decisions.post(state, now, self._rules(), batch, admission),
        )
        return state.seq, posted

    async def put(
        self, visit: Visit, episode_id: str, admission: Admission
    ) -> tuple[EpisodeView, bool]:
        """Set the admission of a new or known episode; True if it was created.

        Raises DeletedEpisode, Refused, LogUnavailable.
        """
        _require_admissible(visit, admission)
        state, created = await self._write(
            visit,
            episode_id,
            lambda state, now: decisions.put(state, now, self._rules(), admission),
        )
        return state.view, created

    async def patch(self, visit: Visit, episode_id: str, change: Change) -> EpisodeView:
        """Change admission, static facts or discharge.

        Raises UnknownEpisode, DeletedEpisode, Refused, LogUnavailable.
        """
        state, _ = await self._write(
            visit, episode_id, lambda state, now: decisions.patch(state, now, self._rules(), change)
        )
        return state.view

    async def delete(self, visit: Visit, episode_id: str) -> None:
        """Mark as deleted; doing so again changes nothing.

        Raises UnknownEpisode, LogUnavailable.
        """
        await self._write(visit, episode_id, lambda state, now: decisions.delete(state))

    async def view(
        self, visit: Visit, episode_id: str, as_of: int | datetime | None = None, min_seq: int = 0
    ) -> EpisodeView:
        """The episode now, or as it was known at a sequence number or instant.

        Raises Forbidden, UnknownEpisode, DeletedEpisode, SeqNotReached, Refused, LogUnavailable,
        LogCorrupt.
        """
        if not visit.principal.may_name(episode_id):
            raise Forbidden
        future = isinstance(as_of, datetime) and as_of > self._clock()
        if isinstance(as_of, datetime):
            # A write that has its time already may not be in the log yet.
            async with self._lock(episode_id):
                state = await self._memory.load(episode_id)
        else:
            state = await self._memory.load(episode_id)
        if state is None or not visit.principal.may_see(state.view.statics):
            raise UnknownEpisode
        if state.seq < max(min_seq, as_of if isinstance(as_of, int) else 0):
            raise SeqNotReached
        view = state.view
        if as_of is not None:
            if future:
                raise Refused("as_of", "in-the-future", "nothing is known of the future")
            entries = entries_as_of(state.entries, as_of)
            if not entries:
                raise UnknownEpisode
            if len(entries) < len(state.entries):
                view = episode_at(entries)
        if view.deleted:
            raise DeletedEpisode
        return view

    async def scores(
        self, view: EpisodeView, n_hours: int, *, exact: bool, live: LiveScores
    ) -> Scored:
        """Scores of at least the first `n_hours` hours of a view, or of a newer one, by one model.

        With `exact` of that very view. Raises Overloaded, LogUnavailable.
        """
        state = await self._memory.reaching(view.episode_id, view.seq)
        if state is None:
            raise UnknownEpisode
        if exact:
            return await live.of_past(state, view, n_hours)
        return await live.newest(state, n_hours)

    @property
    def live(self) -> LiveScores:
        """The scores of the model that answers."""
        return self._models.active.live

    def _rules(self) -> Rules:
        active, *others = self._models.vocabularies
        return Rules(
            vocabulary=active,
            others=tuple(others),
            future_tolerance=self._settings.future_tolerance,
            allowed_lateness=self._settings.allowed_lateness,
        )

    async def _write(
        self, visit: Visit, episode_id: str, decide: _Decide[_T]
    ) -> tuple[EpisodeState, _T]:
        """Carry a decision out, to its end even if the caller goes away or has waited enough.

        Raises Forbidden, TooManyWrites, NotConfirmed.
        """
        if not visit.principal.may_name(episode_id):
            raise Forbidden
        if len(self._writes) >= self._max_writes:
            raise TooManyWrites
        task = asyncio.create_task(self._decide_and_append(visit, episode_id, decide))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        try:
            async with asyncio.timeout(self._write_s) as limit:
                return await asyncio.shield(task)
        except TimeoutError:
            if not limit.expired():
                raise
            raise NotConfirmed from None

    async def _decide_and_append(
        self, visit: Visit, episode_id: str, decide: _Decide[_T]
    ) -> tuple[EpisodeState, _T]:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._write_s
        tries, pause = 0, _PAUSE_S
        async with self._lock(episode_id):
            while True:
                try:
                    return await self._try(visit, episode_id, decide, look=tries > 0)
                except SequenceConflict:
                    # Another process wrote: read what it wrote, and judge again.
                    tries += 1
                    lone = not self._log.shared and tries >= _MAX_CONFLICTS
                    if lone or loop.time() >= give_up:
                        raise LogUnavailable("too many writers of one episode") from None
                await asyncio.sleep(random.uniform(0, pause))
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _try(
        self, visit: Visit, episode_id: str, decide: _Decide[_T], *, look: bool
    ) -> tuple[EpisodeState, _T]:
        """Judge by what the log has now, and append; `look` though nobody else should write.

        Raises SequenceConflict.
        """
        load = self._memory.look if look else self._memory.load
        state = await load(episode_id)
        if state is not None and not visit.principal.may_see(state.view.statics):
            raise UnknownEpisode
        now = self._clock()
        with timing.measured("judge"):
            drafts, outcome = decide(state, now)
        if not all(visit.principal.may_see(statics) for statics in _admitted(drafts)):
            raise Forbidden
        if not drafts:
            assert state is not None
            return state, outcome
        if state is not None:
            # A clock set back must not make the two orders of entries disagree.
            now = max(now, state.entries[-1].recorded_at)
        started = time.perf_counter()
        try:
            entries = await self._log.append(
                episode_id,
                drafts,
                now,
                0 if state is None else state.seq,
                record_of(visit, _action(state, drafts), "success", to_us(now)),
            )
        except Unconfirmed:
            # Whether it is recorded is found out by the next look at the log: that of who sends it
            # again, to whichever replica, or our own, for the list.
            self._memory.drop(episode_id)
            self._models.look_at(episode_id)
            raise
        except Retired:
            raise DeletedEpisode from None
        visit.recorded = True
        self._on_commit(time.perf_counter() - started)
        if state is None:
            state = EpisodeState(entries)
        else:
            state.extend(entries)
        state = self._memory.offer(state)
        self._models.changed(state)
        return state, outcome

    def _lock(self, episode_id: str) -> asyncio.Lock:
        """One writer of an episode at a time in this process."""
        return self._locks.setdefault(episode_id, asyncio.Lock())


def _require_admissible(visit: Visit, admission: Admission | None) -> None:
    """Raises Forbidden for an admission that the client may not make, whether the stay exists or
    not: afterwards the answer would say so.
    """
    if admission is not None and not visit.principal.may_see(admission.statics):
        raise Forbidden


def _admitted(drafts: Sequence[Draft]) -> list[Statics]:
    """What the admissions among the drafts say of the patient."""
    return [Statics(**d.payload["statics"]) for d in drafts if d.kind == "admission"]


def _action(state: EpisodeState | None, drafts: Sequence[Draft]) -> Action:
    """What a write does, for the audit trail. Items are created, whatever becomes of the stay."""
    kinds = {draft.kind for draft in drafts}
    if state is None or kinds & _ITEMS:
        return "create"
    return "delete" if "deletion" in kinds else "update"
