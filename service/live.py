"""The newest scores of every episode: asked of the engine after each write, kept for readers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Protocol

from service.core import Engine, EpisodeView, Overloaded, Scores
from service.log.base import EventLog, LogUnavailable
from service.settings import Settings
from service.state import EpisodeState, Scored, Summary, summarise

_logger = logging.getLogger(__name__)

# How long the catch-up waits before it asks again, for the engine and for the log.
_ENGINE_PAUSE_S = 0.05
_LOG_PAUSE_S = 1.0

# How often a reader may be overtaken by writers of the same episode before it is sent away.
_MAX_TRIES = 20


class Load(Protocol):
    """Loads an episode's state; without `evict` it makes nothing else leave the memory."""

    def __call__(
        self, episode_id: str, *, evict: bool = True
    ) -> Awaitable[EpisodeState | None]: ...


@dataclass(frozen=True, slots=True)
class _Submission:
    """What the engine was last asked for."""

    view: EpisodeView
    n_hours: int
    future: asyncio.Future[Scores]


class LiveScores:
    """Keeps scores up with the log. Scores are a cache: whatever is missing is asked for again."""

    def __init__(self, *, engine: Engine, settings: Settings, load: Load, log: EventLog) -> None:
        self._engine = engine
        self._enabled = settings.scoring_enabled
        self._lateness = settings.allowed_lateness
        self._load = load
        self._log = log
        self._submissions: dict[str, _Submission] = {}
        self._summaries: dict[str, Summary] = {}
        self._behind: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.complete = False
        """Whether every episode in the log has been seen since the start."""

    def start(self) -> None:
        """Begin to read what is in the log and to score the open stays, newest activity first."""
        self._task = asyncio.create_task(self._catch_up())
        self._task.add_done_callback(_report)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def summaries(self) -> Iterable[Summary]:
        """All episodes known so far that are not deleted, in no order."""
        return self._summaries.values()

    def note(self, state: EpisodeState) -> None:
        """Take notice of what an episode is now, without scoring it."""
        view = state.view
        if view.deleted:
            self._summaries.pop(view.episode_id, None)
            return
        previous = self._summaries.get(view.episode_id)
        if previous is None or view.seq >= previous.seq:
            self._summaries[view.episode_id] = summarise(
                view, previous, state.scored, self._lateness
            )

    def changed(self, state: EpisodeState) -> None:
        """Take notice of a write and have the episode scored. Never waits and never fails: what was
        written is durable, whatever becomes of its score.
        """
        self.note(state)
        view = state.view
        if view.deleted:
            self._submissions.pop(view.episode_id, None)
            self._engine.forget(view.episode_id)
        elif self._enabled and view.head_hour >= 0 and not self._offer(state):
            self._behind[view.episode_id] = None
            self._wake.set()

    async def newest(self, state: EpisodeState, n_hours: int) -> Scored:
        """Scores of the state's last entry or a later one, for at least `n_hours` hours.

        Raises Overloaded, LogUnavailable, and whatever the engine fails with.
        """
        seq = state.seq
        for _ in range(_MAX_TRIES):
            scored = state.scored
            if scored and scored.view.seq >= seq and len(scored.scores.hours) >= n_hours:
                return scored
            pending = self._submissions.get(state.episode_id)
            if pending is None or pending.view.seq < state.seq or pending.n_hours < n_hours:
                pending = self._submit(state, n_hours)
            await asyncio.wait([pending.future])
            if not pending.future.cancelled():
                scores = pending.future.result()
                if scores.seq == pending.view.seq:
                    return Scored(view=pending.view, scores=scores)
            # Overtaken by a newer entry: its scores will do as well.
            state = await self._load(state.episode_id) or state
        raise Overloaded

    async def of_past(self, state: EpisodeState, view: EpisodeView, n_hours: int) -> Scored:
        """Scores of exactly this view. Raises Overloaded."""
        scored = state.scored
        if scored and scored.view.seq == view.seq and len(scored.scores.hours) >= n_hours:
            return Scored(view=view, scores=scored.scores)
        return Scored(view=view, scores=await self._engine.submit_as_of(view, n_hours))

    def _offer(self, state: EpisodeState) -> bool:
        """Submit if the engine has room; False if it has none now."""
        try:
            self._submit(state, 0)
        except Overloaded:
            return False
        except Exception as error:
            # A dead engine shows in its health; a reader will meet the same error.
            _logger.error("the engine takes nothing: %s", type(error).__name__)
        return True

    def _submit(self, state: EpisodeState, n_hours: int) -> _Submission:
        view = state.view
        n_hours = max(n_hours, view.head_hour + 1)
        submission = _Submission(view, n_hours, self._engine.submit(view, n_hours))
        self._submissions[view.episode_id] = submission
        submission.future.add_done_callback(lambda _: self._scored(state, submission))
        return submission

    def _scored(self, state: EpisodeState, submission: _Submission) -> None:
        """Keep the result of a submission, unless a newer one has been kept."""
        view, future = submission.view, submission.future
        if self._submissions.get(view.episode_id) is submission:
            del self._submissions[view.episode_id]
        if future.cancelled():
            return
        if (error := future.exception()) is not None:
            _logger.error("scoring failed: %s", type(error).__name__)
            return
        scores = future.result()
        if scores.seq != view.seq:  # overtaken: the newer submission brings its own result
            return
        kept = state.scored
        if kept is None or (scores.seq, len(scores.hours)) >= (
            kept.scores.seq,
            len(kept.scores.hours),
        ):
            state.scored = Scored(view=view, scores=scores)
            if view.episode_id in self._summaries:  # not deleted meanwhile
                self.note(state)

    async def _catch_up(self) -> None:
        """Score every open stay once after a start, then those the engine had no room for."""
        for episode_id in await self._all_episodes():
            await self._revisit(episode_id)
        self.complete = True
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._behind:
                episode_id = next(iter(self._behind))
                del self._behind[episode_id]
                await self._revisit(episode_id)

    async def _all_episodes(self) -> list[str]:
        while True:
            try:
                return await self._log.episode_ids()
            except LogUnavailable:
                _logger.warning("the log cannot be read; trying again")
                await asyncio.sleep(_LOG_PAUSE_S)

    async def _revisit(self, episode_id: str) -> None:
        while True:
            try:
                state = await self._load(episode_id, evict=False)
            except LogUnavailable:
                await asyncio.sleep(_LOG_PAUSE_S)
                continue
            if state is None:
                return
            self.note(state)
            view = state.view
            open_ = not view.deleted and view.discharged_at is None and view.head_hour >= 0
            up_to_date = state.scored is not None and state.scored.view.seq == view.seq
            if not self._enabled or not open_ or up_to_date or self._offer(state):
                return
            await asyncio.sleep(_ENGINE_PAUSE_S)


def _report(task: asyncio.Task[None]) -> None:
    """Without this a failure would stay unseen: nobody waits for the catch-up."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("the catch-up failed: %s", type(error).__name__)
