"""Ticks: the rows of waiting stays through the backend, and their results into the stays.

One lane for the hours of the series pass and, if heads read an event stream, one for its tokens,
each with a slot array of its own. A stay's hours wait until its tokens are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Bundle
from service.engine.answers import Answers
from service.engine.backends.base import Backend, OutOfMemory, TickResult
from service.engine.backends.shapes import slot_bytes
from service.engine.metrics import Cause, EngineMetrics, TickKind
from service.engine.scheduler import Row, Scheduler
from service.engine.slots import SlotTable
from service.engine.stays import HeldStay, features_of, same_bits
from service.engine.tokens import TokenRows
from service.tracing import Tracing

_log = logging.getLogger(__name__)

Clock = Callable[[], float]
"""Seconds that only ever grow."""


@dataclass(slots=True)
class Outcome:
    """What became of the stays of a tick."""

    complete: list[Hashable] = field(default_factory=list)
    faulty: list[Hashable] = field(default_factory=list)
    """The model gave them a number that is not finite."""
    refused: list[Hashable] = field(default_factory=list)
    """There is no memory for them, not even with a single slot."""


class Lanes:
    """Schedulers and slots in front of a backend. `stays` are those of the engine."""

    def __init__(
        self,
        bundle: Bundle,
        answers: Answers,
        backend: Backend,
        stays: Mapping[Hashable, HeldStay],
        metrics: EngineMetrics,
        *,
        token_rows: TokenRows | None,
        turn: Callable[[], AbstractContextManager[object]],
        clock: Clock,
        tracing: Tracing,
    ) -> None:
        self._backend = backend
        self._stays = stays
        self._metrics = metrics
        self._token_rows = token_rows
        self._turn = turn
        self._clock = clock
        self._tracing = tracing
        self._answers = answers
        self._width = bundle.network.model.backbone.hidden_size
        self._hours = self._lane(bundle.network.preprocessing.max_hours)
        self._tokens = None if token_rows is None else self._lane(token_rows.window)
        self._all = [lane for lane in (self._hours, self._tokens) if lane is not None]
        self._n_slots_at_start = backend.n_slots
        self._slot_bytes = slot_bytes(bundle.network)

    @property
    def waiting(self) -> int:
        """Stays with rows to compute."""
        return sum(lane.waiting for lane in self._all)

    @property
    def slots(self) -> SlotTable:
        """The slots of the series pass."""
        return self._hours.slots

    @property
    def slots_lost(self) -> int:
        """Slots given back for want of memory."""
        return self._n_slots_at_start - self._hours.slots.n_slots

    def extend(self, key: Hashable, changed: int) -> bool:
        """Have what is missing of a stay computed, of which the hours from `changed` on are new.

        False if nothing is missing.
        """
        self._hours.crop(key, changed)
        return self._await_tokens(key) or self._await_hours(key)

    def forget(self, key: Hashable) -> None:
        """Compute no more of a stay, and free its slots."""
        for lane in self._all:
            lane.forget(key)

    def tick(self) -> Outcome:
        """One tick of every lane that has something to do."""
        outcome = Outcome()
        for lane, run in ((self._tokens, self._run_tokens), (self._hours, self._run_hours)):
            if lane is None or not (rows := lane.next_tick(self._backend.tick_sizes[-1])):
                continue
            try:
                run(rows, outcome)
                continue
            except OutOfMemory:
                pass  # first let go of the error, which holds on to what the tick had allocated
            self._make_room(rows, outcome)
        return outcome

    def check_integrity(self) -> None:
        """Raise SlotError if the books of slots and stays do not fit together."""
        for lane in self._all:
            lane.check_integrity(self._stays.keys())

    def observe(self, unread: int, unread_hours: int) -> None:
        """Put the figures of the moment into the metrics; `unread` stays with so many hours wait
        besides.
        """
        for lane in self._all:
            self._metrics.evicted(lane.slots.evictions)
            lane.slots.evictions = 0
        rows: dict[TickKind, int] = {"hours": self._hours.rows_waiting + unread_hours}
        if self._tokens is not None:
            rows["tokens"] = self._tokens.rows_waiting
        ticks = {kind: -(-n // self._backend.tick_sizes[-1]) for kind, n in rows.items()}
        self._metrics.backlog(self.waiting + unread, sum(rows.values()), ticks)
        slots = self.slots
        self._metrics.memory(
            used=slots.used,
            free=slots.n_slots - slots.used,
            lost=self.slots_lost,
            kv_bytes=slots.n_slots * self._slot_bytes,
        )

    def _await_tokens(self, key: Hashable) -> bool:
        if self._tokens is None or self._token_rows is None:
            return False
        stay = self._stays[key]
        n_rows = self._token_rows.n_rows(len(stay.tokens.ids))
        self._tokens.crop(key, stay.valid_rows)
        if stay.valid_rows >= n_rows:
            self._tokens.withdraw(key)
            return False
        self._hours.withdraw(key)  # heads read the tokens of the hour
        self._tokens.extend(key, stay.valid_rows, n_rows, stay.urgency)
        return True

    def _await_hours(self, key: Hashable) -> bool:
        stay = self._stays[key]
        if stay.valid >= stay.n_hours:
            return False
        self._hours.extend(key, stay.valid, stay.n_hours, stay.urgency)
        if self._hours.is_rebuild(key) and stay.rebuild_since is None:
            stay.rebuild_since = self._clock()
        return True

    def _run_tokens(self, rows: list[Row], outcome: Outcome) -> None:
        assert self._tokens is not None
        assert self._token_rows is not None
        stays = [self._stays[row.key] for row in rows]
        tokens = [self._token_rows.token(row.number) for row in rows]
        ids = np.array([s.tokens.ids[t] for s, t in zip(stays, tokens, strict=True)], np.int64)
        positions = [row.number % self._token_rows.window for row in rows]
        slots = [row.slot for row in rows]
        started = self._clock()
        with self._turn():
            z = self._backend.tick_tokens(ids, slots, positions)
        self._ticked("tokens", self._clock() - started, stays)
        faulty = {rows[i].key: None for i in np.flatnonzero(~np.isfinite(z).all(axis=1)).tolist()}
        outcome.faulty += faulty
        for stay, row, token, state in zip(stays, rows, tokens, z, strict=True):
            if row.key in faulty:
                continue
            if self._token_rows.counts(row.number) and not stay.write_token(token, state):
                self._differed()
                hour = int(stay.tokens.hours[token])
                stay.crop(hour)
                self._hours.crop(row.key, hour)
            stay.valid_rows = max(stay.valid_rows, row.number + 1)
        for key in self._tokens.done(rows):
            if key not in outcome.faulty and not self._await_hours(key):
                outcome.complete.append(key)

    def _run_hours(self, rows: list[Row], outcome: Outcome) -> None:
        stays = [self._stays[row.key] for row in rows]
        started = self._clock()
        result = self._compute(stays, rows)
        ended = self._clock()
        self._ticked("hours", ended - started, stays)
        outcome.faulty += self._write(stays, rows, result)
        for stay in stays:
            for request in stay.waiting:
                if not request.begun:
                    request.begun = True
                    self._metrics.waited(ended - request.submitted)
                    self._tracing.waited(request.trace, ended - request.submitted)
        outcome.complete += [k for k in self._hours.done(rows) if k not in outcome.faulty]

    def _ticked(self, kind: TickKind, seconds: float, stays: list[HeldStay]) -> None:
        self._metrics.tick(kind, seconds, len(stays))
        if self._tracing.on:
            wheres = [request.trace for stay in stays for request in stay.waiting]
            self._tracing.ticked(kind, seconds, len(stays), wheres)

    def _compute(self, stays: list[HeldStay], rows: list[Row]) -> TickResult:
        slots, hours = [row.slot for row in rows], [row.number for row in rows]
        at = list(zip(stays, hours, strict=True))
        series = np.stack([features_of(stay).series[hour] for stay, hour in at])
        events = np.stack([features_of(stay).events[hour] for stay, hour in at])
        latest = None
        if self._tokens is not None:
            latest = np.stack([stay.latest(hour, self._width) for stay, hour in at])
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
            cause = _cause(stay, row.number)
            causes[cause] = causes.get(cause, 0) + 1
            if not finite[i]:
                faulty[row.key] = None
            if row.key in faulty:
                continue
            if row.number < stay.valid and not same_bits(stay.hidden[row.number], result.hidden[i]):
                self._differed()
                stay.crop(row.number)
            if row.number == stay.valid:
                stay.write(scores[i], result.hidden[i])
        for cause, n in causes.items():
            self._metrics.computed(cause, n)
        return faulty

    def _differed(self) -> None:
        """What was published cannot be had again: the promise of the engine is broken."""
        _log.critical("what was computed again has other bits")
        self._metrics.mismatched()

    def _make_room(self, rows: list[Row], outcome: Outcome) -> None:
        """After a tick there was no memory for: go on with fewer slots, or refuse its stays."""
        self._metrics.ran_out_of_memory()
        if not self._backend.shrink():
            outcome.refused += {row.key: None for row in rows}
            return
        for lane in self._all:
            lane.replace_slots(SlotTable(self._backend.n_slots))

    def _lane(self, window: int) -> Scheduler:
        slots = SlotTable(self._backend.n_slots)
        return Scheduler(slots, window=window, chained=self._backend.chained)


def _cause(stay: HeldStay, hour: int) -> Cause:
    if stay.scratch:
        return "past"
    if hour < stay.valid:
        return "rebuild"
    return "correction" if hour < stay.reached else "new"
