"""The engine: episodes in, scores out, one tick after the other on a thread of its own.

The event loop only hands over requests and receives futures. Everything else happens on the engine
thread, between ticks, so that nothing needs a lock: featurise what came in, find the first hour
whose features differ from what was computed before, let the scheduler pick rows, run them, publish.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Bundle
from llm4ehr.episode import Features, featurise
from llm4ehr.model import Task
from service.core import (
    BundleInfo,
    EngineStopped,
    EpisodeView,
    HourScore,
    HoursInterval,
    ModelFault,
    Overloaded,
    Scores,
)
from service.engine.backends.base import Backend
from service.engine.metrics import EngineMetrics
from service.engine.scheduler import Row, Scheduler
from service.engine.slots import SlotTable
from service.projection import model_episode

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Request:
    """An episode to score up to `n_hours`. `scratch` leaves nothing behind."""

    key: Hashable
    view: EpisodeView
    n_hours: int
    scratch: bool
    future: asyncio.Future[Scores]
    submitted: float


@dataclass(slots=True, eq=False)
class _State:
    """What is held of one stay: a cache of its log, never the truth.

    `valid` hours have outputs that belong to `features`; `hours` are their finished answers, of
    which a correction drops the tail.
    """

    seq: int
    features: Features
    hidden: NDArray[np.float32]  # [max hours, H]
    raw: dict[Task, NDArray[np.float32]]  # [max hours, n]
    scratch: bool
    valid: int = 0
    hours: list[HourScore] = field(default_factory=list)
    waiting: list[_Request] = field(default_factory=list)

    @property
    def n_hours(self) -> int:
        return len(self.features.series)


class OnlineEngine:
    """Implements `service.core.Engine` on top of a backend."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        metrics: EngineMetrics,
        *,
        max_pending: int,
        max_states: int = 4096,
    ) -> None:
        self._bundle = bundle
        self._backend = backend
        self._metrics = metrics
        self._max_pending = max_pending
        self._max_states = max_states
        self._slots = SlotTable(backend.n_slots)
        self._scheduler = Scheduler(self._slots)
        self._states: OrderedDict[Hashable, _State] = OrderedDict()  # least recently used first
        self._inbox: queue.SimpleQueue[_Request | Hashable | None] = queue.SimpleQueue()
        self._pending = 0  # futures not done; touched on the event loop only
        self._scratch_keys = itertools.count()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        config = bundle.network.model.config
        self._widths = dict(config.heads)
        self._info = BundleInfo(
            name=bundle.name,
            version=str(bundle.version),
            digest=bundle.digest,
            preprocessing_digest=bundle.network.preprocessing_digest,
            tasks=tuple(config.heads),
            phenotypes=bundle.phenotypes,
            causal=bundle.network.causal,
        )

    # --- on the event loop -------------------------------------------------------------------

    @property
    def bundle(self) -> BundleInfo:
        """Which model answers."""
        return self._info

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current tick. Requests that are not answered fail with EngineStopped."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive() and self._pending < self._max_pending

    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive() and self._failure is None

    def submit(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        """See `service.core.Engine`."""
        return self._submit(view.episode_id, view, n_hours, scratch=False)

    def submit_as_of(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        """See `service.core.Engine`."""
        return self._submit(("as of", next(self._scratch_keys)), view, n_hours, scratch=True)

    def forget(self, episode_id: str) -> None:
        """See `service.core.Engine`."""
        self._inbox.put(episode_id)

    def _submit(
        self, key: Hashable, view: EpisodeView, n_hours: int | None, *, scratch: bool
    ) -> asyncio.Future[Scores]:
        if not self.alive():
            raise EngineStopped("the engine is not running")
        if self._pending >= self._max_pending:
            raise Overloaded
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._pending += 1
        future.add_done_callback(self._answered)
        n = min(max(view.head_hour + 1, n_hours or 0), self._bundle.network.preprocessing.max_hours)
        self._inbox.put(_Request(key, view, n, scratch, future, time.monotonic()))
        if not self.alive():  # it died since, and may have emptied the inbox before this
            _settle(future, EngineStopped("the engine stopped"))
        return future

    def _answered(self, _: asyncio.Future[Scores]) -> None:
        self._pending -= 1

    # --- on the engine thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_requests():
                if rows := self._scheduler.next_tick(self._backend.max_rows):
                    self._tick(rows)
                else:
                    self._slots.check_integrity()
                self._observe()
        except BaseException as error:
            self._failure = error
            # The type is enough for a log line; a message might quote a patient's value.
            _log.critical("the engine stopped: %s", type(error).__name__)
        finally:
            self._fail_everything()

    def _take_requests(self) -> bool:
        """Take in what has come; waits only when there is nothing to compute. False to stop."""
        wait = not self._scheduler.waiting
        while True:
            try:
                request = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if request is None:
                return False
            if isinstance(request, _Request):
                self._accept(request)
            else:
                self._drop(request, EngineStopped("the episode was dropped"))

    def _accept(self, request: _Request) -> None:
        if request.future.cancelled():
            return
        network, view = self._bundle.network, request.view
        state = self._states.get(request.key)
        if state is not None and view.seq < state.seq:
            # Overtaken on its way here: what is known already answers it as well.
            state.waiting.append(request)
            if state.valid >= state.n_hours:
                self._publish(request.key, state)
            return
        # Whoever waits for more hours than this request asks for shall still get them.
        n_hours = max(
            [request.n_hours, *(r.n_hours for r in state.waiting)] if state else [request.n_hours]
        )
        episode = model_episode(view, network.vocabulary)
        features = featurise(episode, network.vocabulary, network.preprocessing, n_hours)
        if state is None:
            state = self._new_state(request, features)
        unchanged = _common_hours(state.features, features)
        state.features, state.seq = features, view.seq
        state.valid = min(state.valid, unchanged)
        del state.hours[state.valid :]
        state.waiting.append(request)
        self._states.move_to_end(request.key)
        self._scheduler.crop(request.key, unchanged)
        if state.valid < n_hours:
            self._scheduler.extend(request.key, state.valid, n_hours)
        else:
            self._publish(request.key, state)

    def _new_state(self, request: _Request, features: Features) -> _State:
        max_hours = self._bundle.network.preprocessing.max_hours
        state_size = self._bundle.network.model.state_size
        state = _State(
            seq=0,
            features=features,
            hidden=np.zeros((max_hours, state_size), np.float32),
            raw={task: np.zeros((max_hours, n), np.float32) for task, n in self._widths.items()},
            scratch=request.scratch,
        )
        self._states[request.key] = state
        if len(self._states) > self._max_states:
            idle = next(
                (k for k, s in self._states.items() if not s.waiting and s is not state), None
            )
            if idle is not None:
                self._drop(idle, EngineStopped("dropped"))
        return state

    def _tick(self, rows: list[Row]) -> None:
        states = [self._states[row.key] for row in rows]
        series = np.stack([s.features.series[r.hour] for s, r in zip(states, rows, strict=True)])
        events = np.stack([s.features.events[r.hour] for s, r in zip(states, rows, strict=True)])
        started = time.monotonic()
        result = self._backend.tick(series, events, [r.slot for r in rows], [r.hour for r in rows])
        self._metrics.step_seconds.observe(time.monotonic() - started)
        self._metrics.batch_rows.observe(len(rows))
        for i, (state, row) in enumerate(zip(states, rows, strict=True)):
            state.hidden[row.hour] = result.hidden[i]
            for task, raw in result.raw.items():
                state.raw[task][row.hour] = raw[i]
            self._metrics.rows.labels("again" if row.hour < state.valid else "new").inc()
            state.valid = max(state.valid, row.hour + 1)
        for key in self._scheduler.done(rows):
            self._publish(key, self._states[key])

    def _publish(self, key: Hashable, state: _State) -> None:
        """Answer everyone who waits for this stay."""
        first, n = len(state.hours), state.n_hours
        if not all(np.isfinite(a[first:n]).all() for a in (state.hidden, *state.raw.values())):
            self._drop(key, ModelFault("the model gave a number that is not finite"))
            return
        state.hours += self._answers(state, first, n)
        scores = Scores(
            seq=state.seq, hours=tuple(state.hours[:n]), embeddings=state.hidden[:n].copy()
        )
        waiting, state.waiting = state.waiting, []
        if state.scratch:
            self._drop(key, EngineStopped("done"))
        for request in waiting:
            self._metrics.queue_seconds.observe(time.monotonic() - request.submitted)
            _settle(request.future, scores)

    def _answers(self, state: _State, first: int, n: int) -> list[HourScore]:
        calibration, hours = self._bundle.calibration, np.arange(first, n)
        answers = {
            task: calibration[task](raw[first:n], hours).tolist() for task, raw in state.raw.items()
        }
        intervals = self._intervals(state, first, n)
        imputed = 1.0 - state.features.observed[first:n].mean(axis=1)

        def one(task: Task, i: int) -> float | None:
            return answers[task][i][0] if task in answers else None

        return [
            HourScore(
                hour=first + i,
                decompensation=one("decompensation", i),
                mortality=one("mortality", i),
                remaining_los_hours=one("remaining_los", i),
                remaining_los_interval_hours=intervals[i],
                phenotypes=dict(
                    zip(self._bundle.phenotypes, answers["phenotyping"][i], strict=True)
                    if "phenotyping" in answers
                    else ()
                ),
                imputed_share=float(imputed[i]),
            )
            for i in range(n - first)
        ]

    def _intervals(self, state: _State, first: int, n: int) -> list[HoursInterval | None]:
        los = self._bundle.calibration.get("remaining_los")
        if los is None or los.interval is None:
            return [None] * (n - first)
        low, high = los.bounds(state.raw["remaining_los"][first:n], np.arange(first, n))
        ends = zip(low[:, 0].tolist(), high[:, 0].tolist(), strict=True)
        return [HoursInterval(low=a, high=b, coverage=los.interval.coverage) for a, b in ends]

    def _drop(self, key: Hashable, reason: Exception) -> None:
        state = self._states.pop(key, None)
        self._scheduler.forget(key)
        for request in state.waiting if state else ():
            _settle(request.future, reason)

    def _observe(self) -> None:
        self._metrics.pending.set(self._scheduler.waiting)
        self._metrics.slots.labels("used").set(self._slots.used)
        self._metrics.slots.labels("free").set(self._slots.n_slots - self._slots.used)
        self._metrics.evictions.inc(self._slots.evictions)
        self._slots.evictions = 0

    def _fail_everything(self) -> None:
        for key in list(self._states):
            self._drop(key, EngineStopped("the engine stopped"))
        while True:
            try:
                request = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(request, _Request):
                _settle(request.future, EngineStopped("the engine stopped"))


def _common_hours(old: Features, new: Features) -> int:
    """Number of leading hours in which the features are the same, bit for bit."""
    n = min(len(old.series), len(new.series))
    differs = (old.series[:n] != new.series[:n]).any(1) | (old.events[:n] != new.events[:n]).any(1)
    differs |= (old.observed[:n] != new.observed[:n]).any(1)  # answers show it; not all inputs do
    return int(np.argmax(differs)) if differs.any() else n


def _settle(future: asyncio.Future[Scores], outcome: Scores | Exception) -> None:
    """Resolve a future from the engine thread."""

    def settle() -> None:
        if future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        future.get_loop().call_soon_threadsafe(settle)
