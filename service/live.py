"""The newest scores of every episode by one model: asked of its engine, kept for readers.

The model that answers is asked after each write. Another one that is loaded, and every model after
a start, catches up beside it: a bounded number of stays at a time, those written to last first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from weakref import ref

from service.catch_up import CatchUp, Load
from service.core import Engine, EngineStopped, EpisodeView, ModelFault, Overloaded, Scores
from service.decisions import DeletedEpisode
from service.log.base import EventLog
from service.settings import Settings
from service.state import EpisodeState, Scored, Summary, summarise

_logger = logging.getLogger(__name__)

# Stays whose scores are kept, as many as an engine knows.
_MAX_KEPT = 4096

# How often a reader may be overtaken by writers of the same episode before it is sent away.
_MAX_TRIES = 20


@dataclass(frozen=True, slots=True)
class _Submission:
    """What the engine was last asked for, and when the oldest write it answers was acknowledged."""

    view: EpisodeView
    n_hours: int
    future: asyncio.Future[Scores]
    written: float | None
    background: bool


class LiveScores:
    """Keeps the scores of one model up with the log. Scores are a cache: whatever is missing is
    asked for again.

    Only a model that `leads` is asked at once after a write; the scores of another one follow.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        settings: Settings,
        load: Load,
        log: EventLog,
        leads: bool = True,
        on_published: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.engine = engine
        self.leads = leads
        self.on_scored: Callable[[Scored], None] = lambda scored: None
        """Called with the first scores of every new entry."""
        self.on_fault: Callable[[EpisodeView], None] = lambda view: None
        """Called when the model gave a number that is not finite."""
        self._digest = engine.bundle.digest
        self._enabled = settings.scoring_enabled
        self._lateness = settings.allowed_lateness
        self._load = load
        # As many at a time as fill a tick.
        self.catch_up = CatchUp(self, load, log, settings.engine_rows)
        self._on_published = on_published
        self._submissions: dict[str, _Submission] = {}
        self._not_taken: dict[str, float] = {}  # when the oldest write was that was left behind
        self._summaries: dict[str, Summary] = {}
        self.seen: dict[str, int] = {}
        """The last entry that was taken notice of in every episode, deleted ones too."""
        self._kept: OrderedDict[str, ref[EpisodeState]] = OrderedDict()  # scored last comes last
        self._stopped = False
        self._failing: str | None = None

    def start(self, after: LiveScores | None = None) -> None:
        """Begin to score the open stays that are in the log, newest activity first.

        With `after` once that model has seen the log, which is not read again.
        """
        self.catch_up.start(None if after is None else lambda: self._take_over(after))

    def cancel(self) -> None:
        """Ask for nothing more, and keep no scores."""
        self._stopped = True
        self.catch_up.cancel()
        while self._kept:
            self._let_oldest_go()

    async def stop(self) -> None:
        """The same, and wait until nothing of it runs."""
        self.cancel()
        await self.catch_up.stop()

    @property
    def complete(self) -> bool:
        """Whether every episode in the log has been seen since the start."""
        return self.catch_up.seen.is_set()

    @property
    def summaries(self) -> Iterable[Summary]:
        """All episodes known so far that are not deleted, in no order."""
        return self._summaries.values()

    def note(self, state: EpisodeState) -> None:
        """Take notice of what an episode is now, without scoring it."""
        view = state.view
        if view.seq < self.seen.get(view.episode_id, 0):
            return
        self.seen[view.episode_id] = view.seq
        if view.deleted:
            self._summaries.pop(view.episode_id, None)
        else:
            previous = self._summaries.get(view.episode_id)
            self._summaries[view.episode_id] = summarise(
                view, previous, self.kept(state), self._lateness
            )

    def kept(self, state: EpisodeState) -> Scored | None:
        """What is kept of the scores of a stay."""
        return state.scored.get(self._digest)

    def kept_states(self) -> list[EpisodeState]:
        """The stays in memory of whose scores something is kept, scored last comes last."""
        return [state for kept in self._kept.values() if (state := kept()) is not None]

    def changed(self, state: EpisodeState, *, urgent: bool = True) -> None:
        """Take notice of a write and have the episode scored; when there is time if it is not
        `urgent`. Never waits and never fails: what was written is durable, whatever becomes of its
        score.
        """
        self.note(state)
        view = state.view
        if view.deleted:
            self._ask_no_more(view.episode_id)
        elif self._enabled and view.head_hour >= 0:
            if self.leads and urgent:
                written = time.perf_counter()
                if self._offer(state, written):
                    return
                self._not_taken.setdefault(view.episode_id, written)
            self.catch_up.leave_behind(view.episode_id)

    def forget(self, episode_id: str) -> None:
        """Know nothing of an episode, as if it had never been seen."""
        self.seen.pop(episode_id, None)
        self._summaries.pop(episode_id, None)
        self._kept.pop(episode_id, None)
        self._ask_no_more(episode_id)

    def again(self, state: EpisodeState) -> None:
        """Forget what is held of a stay, and have it scored anew."""
        state.scored.pop(self._digest, None)
        if (summary := self._summaries.get(state.episode_id)) is not None:
            self._summaries[state.episode_id] = replace(summary, latest=None, scored_seq=None)
        self.engine.forget(state.episode_id)
        self.changed(state)

    async def newest(self, state: EpisodeState, n_hours: int) -> Scored:
        """Scores of the state's last entry or a later one, for at least `n_hours` hours.

        Raises DeletedEpisode, Overloaded, LogUnavailable, and whatever the engine fails with.
        """
        seq = state.seq
        for _ in range(_MAX_TRIES):
            if state.view.deleted:
                raise DeletedEpisode
            scored = self.kept(state)
            if scored and scored.view.seq >= seq and len(scored.scores.hours) >= n_hours:
                return scored
            pending = self._submissions.get(state.episode_id)
            enough = (
                pending is not None and pending.view.seq >= state.seq and pending.n_hours >= n_hours
            )
            if pending is None or not enough or pending.background:
                try:
                    # Also what is under way for nobody: now somebody waits for it.
                    pending = self._submit(state, n_hours)
                except Overloaded:
                    if pending is None or not enough:
                        raise
            await asyncio.wait([pending.future])
            if not pending.future.cancelled():
                scores = self._result(pending)
                if scores is not None and scores.seq == pending.view.seq:
                    return Scored(view=pending.view, scores=scores)
            # Overtaken by a newer entry: its scores will do as well.
            newer = await self._load(state.episode_id)
            if newer is None:
                raise DeletedEpisode
            state = newer
        raise Overloaded

    def _result(self, pending: _Submission) -> Scores | None:
        """The scores; None if the stay was forgotten meanwhile. Raises as the engine."""
        try:
            return pending.future.result()
        except EngineStopped:
            if not self.engine.alive():
                raise
            return None

    async def of_past(self, state: EpisodeState, view: EpisodeView, n_hours: int) -> Scored:
        """Scores of exactly this view. Raises Overloaded."""
        scored = self.kept(state)
        if scored and scored.view.seq == view.seq and len(scored.scores.hours) >= n_hours:
            return Scored(view=view, scores=scored.scores)
        return Scored(view=view, scores=await self.engine.submit_as_of(view, n_hours))

    def lacks(self, state: EpisodeState) -> bool:
        """Whether an episode can be scored and has not the scores of its last entry."""
        view, kept = state.view, self.kept(state)
        able = self._enabled and not view.deleted and view.head_hour >= 0
        return able and (kept is None or kept.view.seq != view.seq)

    def ask(self, state: EpisodeState) -> asyncio.Future[Scores] | bool:
        """Submit it, unless it is under way; False if the engine has no room now, True if it takes
        nothing.
        """
        asked = self._submissions.get(state.episode_id)
        if asked is not None and asked.view.seq == state.seq:
            return asked.future
        return self._offer(state)

    def _offer(
        self, state: EpisodeState, written: float | None = None
    ) -> asyncio.Future[Scores] | bool:
        """Submit if the engine has room; False if it has none now, True if it takes nothing."""
        try:
            # After a write somebody will ask; what is caught up with waits for nobody.
            return self._submit(state, 0, written, background=written is None).future
        except Overloaded:
            return False
        except Exception as error:
            # A dead engine shows in its health; a reader will meet the same error.
            self._report("the engine takes nothing", error)
            return True

    def _submit(
        self,
        state: EpisodeState,
        n_hours: int,
        written: float | None = None,
        *,
        background: bool = False,
    ) -> _Submission:
        view = state.view
        n_hours = max(n_hours, view.head_hour + 1)
        future = self.engine.submit(view, n_hours, background=background)
        overtaken = self._submissions.get(view.episode_id)
        before = None if overtaken is None else overtaken.written
        not_taken = self._not_taken.pop(view.episode_id, None)
        written = min((t for t in (written, before, not_taken) if t is not None), default=None)
        submission = _Submission(view, n_hours, future, written, background)
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
            forgotten = isinstance(error, EngineStopped) and self.engine.alive()
            if not self._stopped and not forgotten:
                self._report("scoring failed", error)
                if isinstance(error, ModelFault):
                    self.on_fault(view)
            return
        scores = future.result()
        if self._stopped or scores.seq != view.seq:  # overtaken: the newer one brings its own
            return
        self._failing = None
        kept = self.kept(state)
        if kept is not None and (scores.seq, len(scores.hours)) < (
            kept.scores.seq,
            len(kept.scores.hours),
        ):
            return
        scored = self._keep(state, Scored(view=view, scores=scores))
        # What is kept may have left the memory since the first scores of this entry.
        summary = self._summaries.get(view.episode_id)
        first = summary is not None and (summary.scored_seq or 0) < scores.seq
        if view.episode_id in self._summaries:  # not deleted meanwhile
            self.note(state)
        if submission.written is not None:
            self._on_published(time.perf_counter() - submission.written)
        if first:
            self.on_scored(scored)

    def _ask_no_more(self, episode_id: str) -> None:
        self._submissions.pop(episode_id, None)
        self._not_taken.pop(episode_id, None)
        self.engine.forget(episode_id)

    def _report(self, what: str, error: BaseException) -> None:
        """The first of equal failures in a row is logged; metrics count all."""
        kind = type(error).__name__
        if self._failing != kind:
            self._failing = kind
            bundle = self.engine.bundle
            _logger.error("%s: %s, model %s/%s", what, kind, bundle.name, bundle.version)

    def _keep(self, state: EpisodeState, scored: Scored) -> Scored:
        state.scored[self._digest] = scored
        self._kept[state.episode_id] = ref(state)
        self._kept.move_to_end(state.episode_id)
        if len(self._kept) > _MAX_KEPT:
            self._let_oldest_go()
        return scored

    def _let_oldest_go(self) -> None:
        _, kept = self._kept.popitem(last=False)
        if (state := kept()) is not None:
            state.scored.pop(self._digest, None)

    async def _take_over(self, after: LiveScores) -> list[str]:
        """What another model has seen of the log; returns the open stays, newest activity first."""
        await after.catch_up.seen.wait()
        for episode_id, summary in after._summaries.items():
            if episode_id not in self.seen:
                self._summaries[episode_id] = replace(summary, latest=None, scored_seq=None)
        self.seen = after.seen | self.seen
        newest_first = sorted(self._summaries.values(), key=lambda s: s.updated_at, reverse=True)
        return [s.episode_id for s in newest_first if s.discharged_at is None and s.head_hour >= 0]
