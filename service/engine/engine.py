"""The engine: episodes in, scores out, one tick after the other on a thread of its own.

The event loop only hands over requests and receives futures. Everything else happens on the engine
thread, between ticks, so that nothing needs a lock: read what came in, find the first hour that
differs from what was computed before, let the scheduler pick rows, run them, publish.
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
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Bundle
from service.core import (
    BundleInfo,
    EngineStatus,
    EngineStopped,
    EpisodeView,
    ModelFault,
    Overloaded,
    Scores,
)
from service.engine.answers import Answers
from service.engine.backends.base import Backend, OutOfMemory, TickResult
from service.engine.metrics import Cause, EngineMetrics
from service.engine.scheduler import Row, Scheduler
from service.engine.slots import SlotTable
from service.engine.stays import HeldStay, Reader, Request, features_of

_log = logging.getLogger(__name__)

# Between two ticks stays that were not known before are read for so long at most: reading a long
# one takes as long as a tick, and live hours wait meanwhile.
_READ_BUDGET_S = 0.002

# How often the books of the slots are checked, at most.
_CHECK_INTERVAL_S = 1.0


class OnlineEngine:
    """Implements `service.core.Engine` on top of a backend.

    `turn` is entered around every tick: engines that share a device take turns. `on_fatal` is
    called once, on the engine thread, when only a new process can help.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        metrics: EngineMetrics,
        *,
        max_pending: int,
        max_states: int = 4096,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
        cause: Literal["shadow"] | None = None,
    ) -> None:
        self._backend = backend
        self._metrics = metrics
        self._max_pending = max_pending
        self._max_states = max_states
        self._turn = turn
        self._on_fatal = on_fatal
        self._cause = cause
        network = bundle.network
        self._max_hours = network.preprocessing.max_hours
        self._width = network.model.backbone.hidden_size
        self._state_size = network.model.state_size
        self._reader = Reader(network)
        self._answers = Answers(bundle)
        self._hours = self._scheduler(self._max_hours)
        tokens = self._reader.tokens
        self._tokens = None if tokens is None else self._scheduler(tokens.window)
        self._n_slots_at_start = backend.n_slots
        self._states: OrderedDict[Hashable, HeldStay] = OrderedDict()  # least recently used first
        self._inbox: queue.SimpleQueue[Request | Hashable | None] = queue.SimpleQueue()
        self._unread: OrderedDict[Hashable, list[Request]] = OrderedDict()
        self._pending = 0  # futures not done; touched on the event loop only
        self._scratch_keys = itertools.count()
        self._failure: BaseException | None = None
        self._checked = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        config = network.model.config
        self._info = BundleInfo(
            name=bundle.name,
            version=str(bundle.version),
            digest=bundle.digest,
            preprocessing_digest=network.preprocessing_digest,
            tasks=tuple(config.heads),
            phenotypes=bundle.phenotypes,
            causal=network.causal,
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

    def idle(self) -> bool:
        """Whether nobody waits for scores."""
        return self._pending == 0

    def status(self) -> EngineStatus:
        """Figures of the moment, for operators."""
        slots = self._hours.slots
        return EngineStatus(
            backend=self._backend.name,
            tick_sizes=self._backend.tick_sizes,
            slots_used=slots.used,
            slots_free=slots.n_slots - slots.used,
            slots_lost=self._n_slots_at_start - slots.n_slots,
            stays=len(self._states),
            pending_stays=self._pending,
        )

    def submit(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        """See `service.core.Engine`."""
        return self._submit(view.episode_id, view, n_hours, scratch=False)

    def submit_as_of(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        """See `service.core.Engine`."""
        key = ("as of", next(self._scratch_keys))
        future = self._submit(key, view, n_hours, scratch=True)
        # Nobody else can want it.
        future.add_done_callback(lambda f: self._inbox.put(key) if f.cancelled() else None)
        return future

    def forget(self, episode_id: str) -> None:
        """See `service.core.Engine`."""
        self._inbox.put(episode_id)

    def _submit(
        self, key: Hashable, view: EpisodeView, n_hours: int | None, *, scratch: bool
    ) -> asyncio.Future[Scores]:
        if not self.alive():
            raise EngineStopped("the engine is not running")
        if self._pending >= self._max_pending:
            raise Overloaded(self._metrics.retry_after_s())
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._pending += 1
        future.add_done_callback(self._answered)
        n = min(max(view.head_hour + 1, n_hours or 0), self._max_hours)
        self._inbox.put(Request(key, view, n, scratch, future, time.monotonic()))
        if not self.alive():  # it died since, and may have emptied the inbox before this
            _settle(future, EngineStopped("the engine stopped"))
        return future

    def _answered(self, _: asyncio.Future[Scores]) -> None:
        self._pending -= 1

    # --- on the engine thread: what comes in -------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_requests():
                self._tick_tokens()
                self._tick_hours()
                self._observe()
        except BaseException as error:
            self._failure = error
            # The type is enough for a log line; a message might quote a patient's value.
            _log.critical("the engine stopped: %s", type(error).__name__)
            self._on_fatal(error)
        finally:
            self._fail_everything()

    def _take_requests(self) -> bool:
        """Take in what has come; waits only when there is nothing to compute. False to stop."""
        wait = not self._working
        if wait:
            self._check_integrity()
        while True:
            try:
                request = self._inbox.get(block=wait)
            except queue.Empty:
                self._read_unread()
                return True
            wait = False
            if request is None:
                return False
            if isinstance(request, Request):
                self._unread.setdefault(request.key, []).append(request)
            else:
                self._drop(request, EngineStopped("the episode was dropped"))

    @property
    def _working(self) -> bool:
        tokens = self._tokens is not None and self._tokens.waiting
        return bool(self._unread or self._hours.waiting or tokens)

    def _read_unread(self) -> None:
        """Read all that came for known stays, and of the unknown ones as many as time allows."""
        for key in [k for k in self._unread if k in self._states]:
            self._accept(key, self._unread.pop(key))
        until = time.monotonic() + _READ_BUDGET_S
        while self._unread:
            self._accept(*self._unread.popitem(last=False))
            if time.monotonic() >= until:
                return

    def _accept(self, key: Hashable, requests: list[Request]) -> None:
        """Take in requests for one stay. Only the newest view is read."""
        requests = [r for r in requests if not r.future.cancelled()]
        if not requests:
            return
        newest = max(requests, key=lambda r: r.view.seq)
        stay = self._states.get(key)
        if stay is not None and newest.view.seq < stay.seq:
            # Overtaken on their way here: what is known already answers them as well.
            stay.waiting += requests
            if stay.valid >= stay.n_hours:
                self._publish(key, stay)
            return
        if stay is None:
            stay = self._new_stay(newest)
        stay.waiting += requests
        self._states.move_to_end(key)
        # Whoever waits for more hours than the newest request asks for shall still get them.
        n_hours = max(r.n_hours for r in stay.waiting)
        changed = self._reader.read(stay, newest.view, n_hours)
        self._hours.crop(key, changed)
        if not self._await_tokens(key, stay):
            self._await_hours(key, stay)

    def _await_tokens(self, key: Hashable, stay: HeldStay) -> bool:
        """Have the states of missing tokens computed; False if none is missing."""
        if self._tokens is None or self._reader.tokens is None:
            return False
        n_rows = self._reader.tokens.n_rows(len(stay.tokens.ids))
        self._tokens.crop(key, stay.valid_rows)
        if stay.valid_rows >= n_rows:
            self._tokens.withdraw(key)
            return False
        self._hours.withdraw(key)  # heads read the tokens of the hour
        self._tokens.extend(key, stay.valid_rows, n_rows)
        return True

    def _await_hours(self, key: Hashable, stay: HeldStay) -> None:
        if stay.valid < stay.n_hours:
            self._hours.extend(key, stay.valid, stay.n_hours)
            if self._hours.is_rebuild(key) and stay.rebuild_since is None:
                stay.rebuild_since = time.monotonic()
        else:
            self._publish(key, stay)

    def _new_stay(self, request: Request) -> HeldStay:
        stay = HeldStay(request.scratch, self._state_size)
        self._states[request.key] = stay
        if len(self._states) > self._max_states:
            idle = next(
                (k for k, s in self._states.items() if not s.waiting and s is not stay), None
            )
            if idle is not None:
                self._drop(idle, EngineStopped("dropped"))
        return stay

    # --- on the engine thread: ticks ---------------------------------------------------------

    def _tick_tokens(self) -> None:
        if self._tokens is None or self._reader.tokens is None:
            return
        if not (rows := self._tokens.next_tick(self._backend.tick_sizes[-1])):
            return
        stays = [self._states[row.key] for row in rows]
        tokens = [self._reader.tokens.token(row.number) for row in rows]
        ids = np.array([s.tokens.ids[t] for s, t in zip(stays, tokens, strict=True)], np.int64)
        positions = [row.number % self._reader.tokens.window for row in rows]
        started = time.monotonic()
        try:
            with self._turn():
                z = self._backend.tick_tokens(ids, [row.slot for row in rows], positions)
        except OutOfMemory:
            self._make_room(rows)
            return
        self._metrics.tick("tokens", time.monotonic() - started, len(rows))
        faulty: dict[Hashable, None] = {}
        for i, (stay, row) in enumerate(zip(stays, rows, strict=True)):
            if not np.isfinite(z[i]).all():
                faulty[row.key] = None
            elif self._reader.tokens.counts(row.number):
                stay.write_token(tokens[i], z[i])
            stay.valid_rows = max(stay.valid_rows, row.number + 1)
        for key in self._tokens.done(rows):
            if key not in faulty:
                self._await_hours(key, self._states[key])
        self._fault(faulty)

    def _tick_hours(self) -> None:
        if not (rows := self._hours.next_tick(self._backend.tick_sizes[-1])):
            return
        stays = [self._states[row.key] for row in rows]
        started = time.monotonic()
        try:
            result = self._compute(stays, rows)
        except OutOfMemory:
            self._make_room(rows)
            return
        ended = time.monotonic()
        self._metrics.tick("hours", ended - started, len(rows))
        faulty = self._write(stays, rows, result)
        for stay in stays:
            for request in stay.waiting:
                if not request.begun:
                    request.begun = True
                    self._metrics.waited(ended - request.submitted)
        for key in self._hours.done(rows):
            if key not in faulty:
                self._publish(key, self._states[key])
        self._fault(faulty)

    def _compute(self, stays: list[HeldStay], rows: list[Row]) -> TickResult:
        at = [(stay, row.number) for stay, row in zip(stays, rows, strict=True)]
        features = [(features_of(stay), hour) for stay, hour in at]
        series = np.stack([f.series[hour] for f, hour in features])
        events = np.stack([f.events[hour] for f, hour in features])
        latest = None
        if self._tokens is not None:
            latest = np.stack([stay.latest(hour, self._width) for stay, hour in at])
        slots, hours = [row.slot for row in rows], [row.number for row in rows]
        with self._turn():
            return self._backend.tick(series, events, slots, hours, latest)

    def _write(
        self, stays: list[HeldStay], rows: list[Row], result: TickResult
    ) -> dict[Hashable, None]:
        """Keep the results of a tick; returns the stays that got a number that is not finite."""
        outputs = np.concatenate([result.hidden, *result.raw.values()], axis=1)
        finite: NDArray[np.bool_] = np.isfinite(outputs).all(axis=1)
        raw = {task: np.where(finite[:, None], out, 0) for task, out in result.raw.items()}
        hours = np.array([row.number for row in rows])
        observed = np.stack([features_of(s).observed[h] for s, h in zip(stays, hours, strict=True)])
        scores = self._answers.rows(raw, hours, 1.0 - observed.mean(axis=1))
        faulty: dict[Hashable, None] = {}
        causes: dict[Cause, int] = {}
        for i, (stay, row) in enumerate(zip(stays, rows, strict=True)):
            cause = self._cause or _cause(stay, row.number)
            causes[cause] = causes.get(cause, 0) + 1
            if not finite[i]:
                faulty[row.key] = None
            if row.key in faulty:
                continue
            if row.number < stay.valid and not stay.same_bits(row.number, result.hidden[i]):
                # What was published cannot be had again: the promise of the engine is broken.
                _log.critical("an hour that was computed again gave other bits")
                self._metrics.audited(equal=False)
                stay.crop(row.number)
            if row.number == stay.valid:
                stay.write(scores[i], result.hidden[i])
        for cause, n in causes.items():
            self._metrics.computed(cause, n)
        return faulty

    def _fault(self, keys: dict[Hashable, None]) -> None:
        for key in keys:
            self._metrics.faulted()
            self._drop(key, ModelFault("the model gave a number that is not finite"))

    def _make_room(self, rows: list[Row]) -> None:
        """After a tick there was no memory for: go on with fewer slots, or refuse its stays."""
        self._metrics.ran_out_of_memory()
        if self._backend.shrink():
            for lane in self._lanes:
                lane.replace_slots(SlotTable(self._backend.n_slots))
            return
        retry_after_s = self._metrics.retry_after_s()
        for key in {row.key for row in rows}:
            self._drop(key, Overloaded(retry_after_s))

    # --- on the engine thread: what goes out -------------------------------------------------

    def _publish(self, key: Hashable, stay: HeldStay) -> None:
        """Answer everyone who waits for this stay."""
        scores, now = stay.scores(), time.monotonic()
        waiting, stay.waiting = stay.waiting, []
        if stay.rebuild_since is not None:
            self._metrics.rebuilt(now - stay.rebuild_since)
            stay.rebuild_since = None
        if stay.scratch:
            self._drop(key, EngineStopped("done"))
        for request in waiting:
            self._metrics.answered(now - request.submitted)
            _settle(request.future, scores)

    def _drop(self, key: Hashable, reason: Exception) -> None:
        stay = self._states.pop(key, None)
        for lane in self._lanes:
            lane.forget(key)
        waiting = [*self._unread.pop(key, ()), *(stay.waiting if stay else ())]
        for request in waiting:
            _settle(request.future, reason)

    def _observe(self) -> None:
        stays = rows = 0
        for lane in self._lanes:
            stays, rows = stays + lane.waiting, rows + lane.rows_waiting
            self._metrics.evicted(lane.slots.evictions)
            lane.slots.evictions = 0
        self._metrics.backlog(stays + len(self._unread), rows)
        slots = self._hours.slots
        self._metrics.memory(
            used=slots.used,
            free=slots.n_slots - slots.used,
            lost=self._n_slots_at_start - slots.n_slots,
        )

    def _check_integrity(self) -> None:
        """Raise SlotError if the books of slots and stays do not fit together."""
        if (now := time.monotonic()) - self._checked < _CHECK_INTERVAL_S:
            return
        self._checked = now
        for lane in self._lanes:
            lane.check_integrity(self._states.keys())

    def _fail_everything(self) -> None:
        for key in [*self._states, *self._unread]:
            self._drop(key, EngineStopped("the engine stopped"))
        while True:
            try:
                request = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(request, Request):
                _settle(request.future, EngineStopped("the engine stopped"))

    @property
    def _lanes(self) -> list[Scheduler]:
        return [self._hours] if self._tokens is None else [self._hours, self._tokens]

    def _scheduler(self, window: int) -> Scheduler:
        slots = SlotTable(self._backend.n_slots)
        return Scheduler(slots, window=window, chained=self._backend.chained)


def _cause(stay: HeldStay, hour: int) -> Cause:
    if stay.scratch:
        return "past"
    if hour < stay.valid:
        return "rebuild"
    return "correction" if hour < stay.reached else "new"


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
