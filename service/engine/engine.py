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

from llm4ehr.bundle import Bundle
from service.core import (
    BundleInfo,
    EngineStatus,
    EngineStopped,
    EpisodeView,
    ModelFault,
    Numerics,
    Overloaded,
    Scores,
)
from service.engine.answers import Answers
from service.engine.backends.base import Backend
from service.engine.lanes import Clock, Lanes
from service.engine.metrics import EngineMetrics
from service.engine.stays import HeldStay, Reader, Request
from service.tracing import OFF, Tracing

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
        numerics: Numerics,
        max_pending: int,
        max_state_bytes: int = 1 << 30,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
        clock: Clock = time.monotonic,
        tracing: Tracing = OFF,
    ) -> None:
        self._backend = backend
        self._metrics = metrics
        self._max_pending = max_pending
        self._max_state_bytes = max_state_bytes
        self._state_bytes = 0
        self._on_fatal = on_fatal
        self._clock = clock
        self._tracing = tracing
        network = bundle.network
        self._max_hours = network.preprocessing.max_hours
        self._state_size = network.model.state_size
        self._reader = Reader(network)
        self._states: OrderedDict[Hashable, HeldStay] = OrderedDict()  # least recently used first
        self._answers = Answers(bundle)
        self._lanes = Lanes(
            bundle,
            self._answers,
            backend,
            self._states,
            metrics,
            token_rows=self._reader.tokens,
            turn=turn,
            clock=clock,
            tracing=tracing,
        )
        self._inbox: queue.SimpleQueue[Request | Hashable | None] = queue.SimpleQueue()
        self._unread: dict[Hashable, list[Request]] = {}
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
            numerics=numerics,
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

    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive() and self._failure is None

    def idle(self) -> bool:
        """Whether nobody waits for scores."""
        return self._pending == 0

    def status(self) -> EngineStatus:
        """Figures of the moment, for operators."""
        slots = self._lanes.slots
        return EngineStatus(
            backend=self._backend.name,
            tick_sizes=self._backend.tick_sizes,
            slots_used=slots.used,
            slots_free=slots.n_slots - slots.used,
            slots_lost=self._lanes.slots_lost,
            stays=len(self._states),
            pending_stays=self._pending,
        )

    def submit(
        self, view: EpisodeView, n_hours: int | None = None, *, background: bool = False
    ) -> asyncio.Future[Scores]:
        """See `service.core.Engine`."""
        return self._submit(view.episode_id, view, n_hours, background=background)

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
        self,
        key: Hashable,
        view: EpisodeView,
        n_hours: int | None,
        *,
        scratch: bool = False,
        background: bool = False,
    ) -> asyncio.Future[Scores]:
        if not self.alive():
            raise EngineStopped("the engine is not running")
        if self._pending >= self._max_pending:
            raise Overloaded(self._metrics.retry_after_s())
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._pending += 1
        future.add_done_callback(self._answered)
        n = min(max(view.head_hour + 1, n_hours or 0), self._max_hours)
        now, where = self._clock(), self._tracing.here()
        request = Request(key, view, n, scratch, future, now, background, trace=where)
        self._inbox.put(request)
        if not self.alive():  # it died since, and may have emptied the inbox before this
            _settle(future, EngineStopped("the engine stopped"))
        return future

    def _answered(self, _: asyncio.Future[Scores]) -> None:
        self._pending -= 1

    # --- on the engine thread: what comes in -------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_requests():
                self._tick()
                # Of what is not read yet, the hours are known, but not how many have changed.
                hours = sum(requests[-1].n_hours for requests in self._unread.values())
                self._lanes.observe(len(self._unread), hours)
        except BaseException as error:
            self._failure = error
            # The type is enough for a log line; a message might quote a patient's value.
            kind, info = type(error).__name__, self._info
            _log.critical("the engine stopped: %s, model %s/%s", kind, info.name, info.version)
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
        return bool(self._unread or self._lanes.waiting)

    def _read_unread(self) -> None:
        """Read all that came for known stays, and of the unknown ones as many as time allows."""
        for key in [k for k in self._unread if k in self._states]:
            self._accept(key, self._unread.pop(key))
        until = self._clock() + _READ_BUDGET_S
        # Those that somebody waits for come first.
        for key in sorted(self._unread, key=lambda k: all(r.background for r in self._unread[k])):
            self._accept(key, self._unread.pop(key))
            if self._clock() >= until:
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
        # Whoever waits for more hours than the newest request asks for shall still get them, and
        # hours that were computed from the same entries are kept.
        n_hours = max(r.n_hours for r in stay.waiting)
        if newest.view.seq == stay.seq:
            n_hours = max(n_hours, stay.n_hours)
        try:
            changed = self._reader.read(stay, newest.view, n_hours)
        except Exception as error:
            # Of this stay alone: with the next one all may be well.
            _log.error("a stay cannot be read: %s", type(error).__name__)
            self._metrics.faulted()
            self._drop(key, ModelFault("the stay cannot be turned into input of the model"))
            return
        self._count(stay)
        if not self._lanes.extend(key, changed):
            self._publish(key, stay)

    def _new_stay(self, request: Request) -> HeldStay:
        stay = HeldStay(request.scratch, self._state_size, self._answers.layout)
        self._states[request.key] = stay
        return stay

    def _count(self, stay: HeldStay) -> None:
        """Put down what a stay takes now, and drop those that were not used for longest if all
        together take too much.
        """
        n_bytes = stay.n_bytes
        self._state_bytes += n_bytes - stay.counted
        stay.counted = n_bytes
        if self._state_bytes <= self._max_state_bytes:
            return
        for key in [
            key
            for key, held in self._states.items()
            if not held.waiting and held is not stay and key not in self._unread
        ]:
            self._drop(key, EngineStopped("dropped"))
            if self._state_bytes <= self._max_state_bytes:
                return

    # --- on the engine thread: what goes out -------------------------------------------------

    def _tick(self) -> None:
        outcome = self._lanes.tick()
        for key in outcome.faulty:
            self._metrics.faulted()
            self._drop(key, ModelFault("the model gave a number that is not finite"))
        for key in outcome.refused:
            self._drop(key, Overloaded(self._metrics.retry_after_s()))
        for key in outcome.complete:
            self._publish(key, self._states[key])

    def _publish(self, key: Hashable, stay: HeldStay) -> None:
        """Answer everyone who waits for this stay."""
        scores, now = stay.scores(), self._clock()
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
        self._state_bytes -= stay.counted if stay else 0
        self._lanes.forget(key)
        waiting = [*self._unread.pop(key, ()), *(stay.waiting if stay else ())]
        for request in waiting:
            _settle(request.future, reason)

    def _check_integrity(self) -> None:
        """Raise SlotError if the books of slots and stays do not fit together."""
        if (now := self._clock()) - self._checked < _CHECK_INTERVAL_S:
            return
        self._checked = now
        self._lanes.check_integrity()

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
