"""Which rows of which stays go into the next tick. No torch, no threads, no clock.

A *stay* here is anything that owns a slot: a live episode or a scratch computation for a past view.
Its rows are the hours of the series pass, or what `service.engine.tokens` makes of its events.

    rows of a stay:  |0 ......... reached-1|reached ... n_rows-1|
                      K and V are written   to be computed

`extend` crops what is in the slot to a row and computes from there: a new hour, a correction three
hours back, a rebuild after eviction are the same thing with other lengths.

A slot holds one window of rows: row r stands at position r % window and reads the rows of its own
window only. Stays have fewer hours than a window of the series pass has rows, so there it is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from service.engine.slots import Lease, SlotError, SlotTable


@dataclass(slots=True, kw_only=True)
class Stay:
    """What the scheduler knows of one stay.

    Its slot holds K and V of the rows `first` .. `reached - 1`, which stand in one window. Results
    are known of the rows before `needed`; `reached` is behind it while lost K and V are made again.
    """

    key: Hashable
    n_rows: int = 0
    needed: int = 0
    first: int = 0
    reached: int = 0
    lease: Lease | None = None

    @property
    def complete(self) -> bool:
        return self.reached >= self.n_rows


class Urgency(IntEnum):
    """Why a rebuild is wanted, the most urgent first."""

    LIVE = 0
    """Somebody waits for what is known now."""
    PAST = 1
    """Somebody waits for what was known once."""
    BACKGROUND = 2
    """Nobody waits for it."""


class Row(NamedTuple):
    """One row of a tick."""

    key: Hashable
    slot: int
    number: int


class Scheduler:
    """Live stays get their next rows first, then rebuilds by their urgency: of live stays that
    somebody waits for, of the past, in the background.

    Live stays take turns, one row each, so that a long one cannot starve the others. Rebuilds go
    one after the other: in turns all of them would end as late as the last. With `chained` false a
    tick has one row of a stay at most.
    """

    def __init__(self, slots: SlotTable, *, window: int, chained: bool = True) -> None:
        self.slots = slots
        self.stays: dict[Hashable, Stay] = {}
        self._window = window
        self._chained = chained
        self._live: deque[Hashable] = deque()
        self._rebuilds: tuple[deque[Hashable], ...] = tuple(deque() for _ in Urgency)
        self._queued: dict[Hashable, deque[Hashable]] = {}

    @property
    def waiting(self) -> int:
        """Stays with rows to compute."""
        return len(self._queued)

    @property
    def rows_waiting(self) -> int:
        """Rows to compute."""
        return sum(s.n_rows - s.reached for s in map(self.stays.__getitem__, self._queued))

    def is_rebuild(self, key: Hashable) -> bool:
        """Whether a queued stay began with an empty slot and more than one row to compute."""
        return self._queued.get(key, self._live) is not self._live

    def crop(self, key: Hashable, row: int) -> None:
        """What the slot of a stay holds from `row` on is no longer its own."""
        stay = self.stays.setdefault(key, Stay(key=key))
        stay.needed = min(stay.needed, row)
        if row < stay.first:
            self._empty(stay)
        else:
            stay.reached = min(stay.reached, row)

    def extend(
        self, key: Hashable, from_row: int, n_rows: int, urgency: Urgency = Urgency.LIVE
    ) -> None:
        """Rows `from_row` .. `n_rows - 1` of a stay are to be computed.

        A stay whose slot is empty and that has more than one row is rebuilt; any other is live.
        Asked for again with more urgency, it moves up.
        """
        self.crop(key, from_row)
        stay = self.stays[key]
        stay.n_rows = n_rows
        held, rebuilds = self._queued.get(key), self._rebuilds[urgency]
        if held is None:
            rebuild = stay.first == stay.reached and n_rows - stay.reached > 1
            self._enter(key, rebuilds if rebuild else self._live)
        elif any(held is less for less in self._rebuilds[urgency + 1 :]):
            held.remove(key)
            self._enter(key, rebuilds)

    def next_tick(self, max_rows: int) -> list[Row]:
        """The rows of the next tick, those of one stay in order; empty when nothing is to be done.

        The caller computes them and calls `done`.
        """
        rows: list[Row] = []
        for queue in self._queues:
            if len(rows) < max_rows:  # a queue that gets no row keeps its order of turns
                self._fill(queue, rows, max_rows)
        return rows

    def _enter(self, key: Hashable, queue: deque[Hashable]) -> None:
        self._queued[key] = queue
        queue.append(key)

    def _fill(self, queue: deque[Hashable], rows: list[Row], max_rows: int) -> None:
        turns, in_turns = deque(queue), queue is self._live
        taken: dict[Hashable, int] = {}
        while turns and len(rows) < max_rows:
            key = turns.popleft()
            stay = self.stays[key]
            lease = self.slots.lease(key) or self._acquire(stay)
            if lease is None:
                continue  # its turn comes when one of those that are under way is complete
            if lease != stay.lease:
                raise SlotError("a stay holds another slot than it was given")
            row = stay.reached + taken.get(key, 0)
            rows.append(Row(key, lease.slot, row))
            taken[key] = taken.get(key, 0) + 1
            # The next window would overwrite what the last rows of this one still read.
            window_ends = (row + 1) % self._window == 0
            if self._chained and row + 1 < stay.n_rows and not window_ends:
                (turns.append if in_turns else turns.appendleft)(key)
        if in_turns:
            queue.rotate(-1)

    def _acquire(self, stay: Stay) -> Lease | None:
        # Stays under way keep their slots, else many rebuilds would undo one another.
        acquired = self.slots.acquire(stay.key, self._queued)
        if acquired is None:
            return None
        stay.lease, evicted = acquired
        if evicted is not None:
            self._lose(self.stays[evicted])
        return stay.lease

    def _lose(self, stay: Stay) -> None:
        stay.lease = None
        self._empty(stay)

    def _empty(self, stay: Stay) -> None:
        """Nothing is in the slot: the window of the first row that is needed begins anew."""
        stay.first = stay.reached = self._window_of(stay.needed)

    def done(self, rows: list[Row]) -> list[Hashable]:
        """Record a computed tick; returns the stays that are now complete, which leave the queue.

        Rows that changed while the tick ran must not be counted: call `extend` only between ticks.
        """
        complete = []
        for row in rows:
            stay = self.stays[row.key]
            stay.first, stay.reached = self._window_of(row.number), row.number + 1
            stay.needed = max(stay.needed, stay.reached)
        for key in dict.fromkeys(row.key for row in rows):
            if self.stays[key].complete:
                self._leave(key)
                complete.append(key)
        return complete

    def withdraw(self, key: Hashable) -> None:
        """Compute no more of a stay for now. Its slot keeps what it holds."""
        self._leave(key)

    def forget(self, key: Hashable) -> None:
        """Drop a stay and free its slot."""
        self._leave(key)
        self.stays.pop(key, None)
        self.slots.release(key)

    def replace_slots(self, slots: SlotTable) -> None:
        """Go on with other slots, all of them empty; who was waiting waits on."""
        self.slots = slots
        for stay in self.stays.values():
            self._lose(stay)

    def check_integrity(self, known: Collection[Hashable]) -> None:
        """Raise SlotError unless slots, owners and what they are said to hold fit together.

        `known` are the stays there may be.
        """
        self.slots.check_integrity()
        if not self.stays.keys() <= set(known):
            raise SlotError("a slot belongs to a stay that is gone")
        leases = {key: stay.lease for key, stay in self.stays.items() if stay.lease is not None}
        if len(leases) != self.slots.used:
            raise SlotError("the slots in use are not those of the stays")
        for stay in self.stays.values():
            if stay.lease is None and stay.first < stay.reached:
                raise SlotError("a stay without a slot is said to hold rows")
            if not stay.first <= stay.reached <= min(stay.needed, stay.first + self._window):
                raise SlotError("the counts of a stay do not fit")
        if self._queued != {key: queue for queue in self._queues for key in queue}:
            raise SlotError("a queue has lost a stay")

    @property
    def _queues(self) -> tuple[deque[Hashable], ...]:
        return self._live, *self._rebuilds

    def _window_of(self, row: int) -> int:
        """First row of the window that a row stands in."""
        return row // self._window * self._window

    def _leave(self, key: Hashable) -> None:
        if (queue := self._queued.pop(key, None)) is not None:
            queue.remove(key)
