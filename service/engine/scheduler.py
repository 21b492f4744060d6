"""Which hours of which stays go into the next tick. No torch, no threads, no clock.

A *stay* here is anything that owns a slot: a live episode or a scratch computation for a past view.

    rows of a stay:  |0 ... in_slot-1|in_slot ... n_hours-1|
                      K and V written   to be computed

`extend` crops what is in the slot to an hour and computes from there: a new hour, a correction
three hours back, a rebuild after eviction are the same thing with other lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.slots import SlotTable


@dataclass(slots=True, kw_only=True)
class Stay:
    """What the scheduler knows of one stay."""

    key: Hashable
    n_hours: int = 0
    in_slot: int = 0  # hours whose K and V are in the slot and up to date


class Row(NamedTuple):
    """One row of a tick."""

    key: Hashable
    slot: int
    hour: int


class Scheduler:
    """Two queues: live stays get their next hours first, rebuilds fill what is left of a tick.

    Within a queue stays take turns, one hour each, so that a long one cannot starve the others.
    """

    def __init__(self, slots: SlotTable) -> None:
        self.slots = slots
        self.stays: dict[Hashable, Stay] = {}
        self._live: deque[Hashable] = deque()
        self._rebuild: deque[Hashable] = deque()
        self._queued: set[Hashable] = set()

    @property
    def waiting(self) -> int:
        """Stays with hours to compute."""
        return len(self._queued)

    def crop(self, key: Hashable, hour: int) -> None:
        """What the slot of a stay holds from `hour` on is no longer its own."""
        stay = self.stays.setdefault(key, Stay(key=key))
        stay.in_slot = min(stay.in_slot, hour)

    def extend(self, key: Hashable, from_hour: int, n_hours: int) -> None:
        """Hours `from_hour` .. `n_hours - 1` of a stay are to be computed.

        A stay whose slot is empty and that has more than one hour is rebuilt; any other is live.
        """
        self.crop(key, from_hour)
        stay = self.stays[key]
        stay.n_hours = n_hours
        if key not in self._queued:
            self._queued.add(key)
            rebuild = stay.in_slot == 0 and n_hours > 1
            (self._rebuild if rebuild else self._live).append(key)

    def next_tick(self, max_rows: int) -> list[Row]:
        """The rows of the next tick, hours of one stay in order; empty when nothing is to be done.

        The caller computes them and calls `done`.
        """
        rows: list[Row] = []
        for queue in (self._live, self._rebuild):
            if len(rows) < max_rows:  # a queue that gets no row keeps its order of turns
                self._fill(queue, rows, max_rows)
        return rows

    def _fill(self, queue: deque[Hashable], rows: list[Row], max_rows: int) -> None:
        turns = deque(queue)
        taken: dict[Hashable, int] = {}
        while turns and len(rows) < max_rows:
            key = turns.popleft()
            stay = self.stays[key]
            slot = self.slots.slot(key)
            if slot is None:
                # Stays under way keep their slots, else many rebuilds would undo one another.
                acquired = self.slots.acquire(key, self._queued)
                if acquired is None:
                    continue  # its turn comes when one of those is complete
                slot, evicted = acquired
                stay.in_slot = 0
                if evicted is not None and evicted in self.stays:
                    self.stays[evicted].in_slot = 0
            hour = stay.in_slot + taken.get(key, 0)
            rows.append(Row(key, slot, hour))
            taken[key] = taken.get(key, 0) + 1
            if hour + 1 < stay.n_hours:
                turns.append(key)
        queue.rotate(-1)

    def done(self, rows: list[Row]) -> list[Hashable]:
        """Record a computed tick; returns the stays that are now complete, which leave the queue.

        Hours that changed while the tick ran must not be counted: call `extend` only between ticks.
        """
        complete = []
        for row in rows:
            stay = self.stays[row.key]
            stay.in_slot = max(stay.in_slot, row.hour + 1)
        for key in dict.fromkeys(row.key for row in rows):
            stay = self.stays[key]
            if stay.in_slot >= stay.n_hours:
                self._leave(key)
                complete.append(key)
        return complete

    def forget(self, key: Hashable) -> None:
        """Drop a stay and free its slot."""
        self._leave(key)
        self.stays.pop(key, None)
        self.slots.release(key)

    def _leave(self, key: Hashable) -> None:
        if key in self._queued:
            self._queued.remove(key)
            for queue in (self._live, self._rebuild):
                if key in queue:
                    queue.remove(key)
