"""The scheduler against a model of what stands in the slots. No torch, no threads, no clock."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.scheduler import Row, Scheduler, Urgency
from service.engine.slots import Lease, SlotError, SlotTable

KEYS = st.sampled_from(["a", "b", "c", "d", "e"])
HOURS = st.integers(0, 12)


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine. Every cell of a slot remembers whose row was written to it, and in which
    edition: a row may only be computed on top of the newest edition of its own stay's rows, all
    those of its window.
    """

    @initialize(
        n_slots=st.integers(1, 3),
        max_rows=st.integers(1, 7),
        window=st.sampled_from([2, 4, 5, 13]),
        chained=st.booleans(),
    )
    def start(self, n_slots: int, max_rows: int, window: int, chained: bool) -> None:
        self.n_slots, self.max_rows = n_slots, max_rows
        self.window, self.chained = window, chained
        self.scheduler = Scheduler(SlotTable(n_slots), window=window, chained=chained)
        self.empty_slots()
        self.edition: Counter[tuple[str, int]] = Counter()
        self.valid: Counter[str] = Counter()
        self.wanted: dict[str, int] = {}  # queued stays

    def empty_slots(self) -> None:
        self.cells: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.owner: dict[int, str] = {}

    @rule(key=KEYS, unchanged=HOURS, n_hours=HOURS, urgency=st.sampled_from(Urgency))
    def submit(self, key: str, unchanged: int, n_hours: int, urgency: Urgency) -> None:
        """A stay of `n_hours` arrives, the first `unchanged` of them as they were."""
        n_hours = max(n_hours, self.wanted.get(key, 0))
        for hour in range(unchanged, 13):
            self.edition[key, hour] += 1
        self.valid[key] = min(self.valid[key], unchanged)
        self.scheduler.crop(key, unchanged)
        if self.valid[key] < n_hours:
            self.scheduler.extend(key, self.valid[key], n_hours, urgency)
            self.wanted[key] = n_hours
        else:
            assert key not in self.wanted

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.scheduler.forget(key)
        self.owner = {slot: owner for slot, owner in self.owner.items() if owner != key}
        self.wanted.pop(key, None)
        self.valid[key] = 0

    @rule()
    def tick(self) -> None:
        rows = self.scheduler.next_tick(self.max_rows)
        assert len(rows) <= self.max_rows
        assert bool(rows) == bool(self.wanted)
        for row in rows:
            self.write(row)
        for row in rows:  # all rows of a tick write before any of them reads
            self.read(row)
        assert self.chained or len({row.key for row in rows}) == len(rows)
        turns = Counter(row.key for row in rows)
        done = self.scheduler.done(rows)
        assert set(done) == {k for k in turns if self.wanted[k] == self.valid[k]}
        assert len(done) == len(set(done))
        for key in done:
            del self.wanted[key]

    def write(self, row: Row) -> None:
        key, slot, number = row
        assert key in self.wanted
        assert 0 <= slot < self.n_slots
        if (former := self.owner.get(slot)) != key:
            assert former not in self.wanted, "a slot was taken from a stay under way"
            assert key not in self.owner.values(), "a stay has two slots"
            self.owner[slot] = key
        self.cells[slot, number % self.window] = (key, number, self.edition[key, number])
        assert number <= self.valid[key], "a result was skipped"
        self.valid[key] = max(self.valid[key], number + 1)
        assert self.valid[key] <= self.wanted[key]

    def read(self, row: Row) -> None:
        key, slot, number = row
        first = number - number % self.window
        seen = [self.cells.get((slot, place)) for place in range(number % self.window + 1)]
        own = [(key, r, self.edition[key, r]) for r in range(first, number + 1)]
        assert seen == own, "a row reads what is not its own, or outdated"

    @rule(fewer=st.booleans())
    def lose_all_slots(self, fewer: bool) -> None:
        """Out of memory: the backend goes on with other slots."""
        self.n_slots = max(self.n_slots - fewer, 1)
        self.scheduler.replace_slots(SlotTable(self.n_slots))
        self.empty_slots()

    @rule(key=KEYS)
    def withdraw(self, key: str) -> None:
        self.scheduler.withdraw(key)
        self.wanted.pop(key, None)

    @precondition(lambda self: self.wanted)
    @rule()
    def everything_queued_completes(self) -> None:
        # Whoever is evicted starts again at hour 0, but nobody who is queued is ever evicted.
        # A window is computed again from its beginning at most.
        for _ in range(sum(n + self.window for n in self.wanted.values())):
            if self.wanted:
                self.tick()
        assert not self.wanted

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity("abcde")
            assert self.scheduler.waiting == len(self.wanted)

    def teardown(self) -> None:
        if hasattr(self, "scheduler") and self.wanted:
            self.everything_queued_completes()


SchedulerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=25)
TestScheduler = SchedulerMachine.TestCase


def scheduler(n_slots: int = 8, **options: Any) -> Scheduler:
    return Scheduler(SlotTable(n_slots), **{"window": 200} | options)


def run(scheduler: Scheduler, max_rows: int) -> list[str]:
    """One tick, as text: "a0 a1 b0"."""
    rows = scheduler.next_tick(max_rows)
    scheduler.done(rows)
    return [f"{row.key}{row.number}" for row in rows]


def rebuilt(*keys: str, n_slots: int = 8, n_hours: int = 6) -> Scheduler:
    """Stays that begin with an empty slot."""
    made = scheduler(n_slots)
    for key in keys:
        made.extend(key, 0, n_hours)
    return made


def live(*keys: str, n_hours: int = 6) -> Scheduler:
    """Stays with one hour in their slot, and more to come."""
    made = scheduler()
    for key in keys:
        made.extend(key, 0, 1)
    run(made, 16)
    for key in keys:
        made.extend(key, 1, 1 + n_hours)
    return made


def test_a_tick_takes_one_hour_of_each_live_stay_in_turn() -> None:
    assert run(live("a", "b", "c"), 7) == ["a1", "b1", "c1", "a2", "b2", "c2", "a3"]


def test_rebuilds_go_one_after_the_other() -> None:
    made = rebuilt("a", "b", "c", n_hours=3)
    assert run(made, 4) == ["a0", "a1", "a2", "b0"]
    assert run(made, 4) == ["b1", "b2", "c0", "c1"]


def test_who_is_waited_for_goes_before_the_background() -> None:
    made = scheduler()
    for key in "abc":
        made.extend(key, 0, 3, Urgency.BACKGROUND)
    made.extend("p", 0, 2, Urgency.PAST)
    made.extend("d", 0, 2)
    assert run(made, 5) == ["d0", "d1", "p0", "p1", "a0"]
    made.extend("c", 0, 3)  # now somebody waits for it as well
    assert run(made, 9) == ["c0", "c1", "c2", "a1", "a2", "b0", "b1", "b2"]
    assert made.waiting == 0


def test_a_single_stay_fills_a_tick() -> None:
    assert run(rebuilt("a"), 16) == ["a0", "a1", "a2", "a3", "a4", "a5"]


def test_turns_are_taken_across_ticks() -> None:
    """With room for one row, five stays have one row each after five ticks."""
    made = live(*"abcde")
    for hour in range(1, 7):
        assert sorted(run(made, 1)[0] for _ in range(5)) == [f"{k}{hour}" for k in "abcde"]
    assert made.waiting == 0


def test_live_hours_go_before_rebuilds() -> None:
    made = rebuilt("old")
    made.extend("new", 0, 1)
    assert run(made, 3) == ["new0", "old0", "old1"]
    made.extend("new", 1, 3)
    assert run(made, 3) == ["new1", "new2", "old2"]


def test_a_correction_is_live_and_costs_its_tail_alone() -> None:
    made = rebuilt("a", "b")
    run(made, 16)
    made.extend("a", 4, 6)
    assert run(made, 16) == ["a4", "a5"]
    made.crop("a", 1)
    made.extend("a", 5, 6)
    assert run(made, 16) == ["a1", "a2", "a3", "a4", "a5"]


def test_an_evicted_stay_begins_again() -> None:
    made = rebuilt("a", n_slots=1, n_hours=3)
    assert run(made, 9) == ["a0", "a1", "a2"]
    made.extend("b", 0, 2)
    assert run(made, 9) == ["b0", "b1"]
    made.extend("a", 3, 4)
    assert run(made, 9) == ["a0", "a1", "a2", "a3"]
    assert made.slots.evictions == 2


def test_more_stays_than_slots_wait_for_their_turn() -> None:
    made = rebuilt("a", "b", "c", n_slots=2, n_hours=2)
    assert run(made, 9) == ["a0", "a1", "b0", "b1"]
    assert run(made, 9) == ["c0", "c1"]
    assert made.waiting == 0


def test_nothing_to_do_is_an_empty_tick() -> None:
    assert run(scheduler(), 4) == []


def test_the_next_window_waits_for_the_next_tick() -> None:
    """It would overwrite what the last rows of the former one read in the same tick."""
    made = scheduler(window=4)
    made.extend("a", 0, 10)
    assert run(made, 9) == ["a0", "a1", "a2", "a3"]
    assert run(made, 9) == ["a4", "a5", "a6", "a7"]
    assert run(made, 9) == ["a8", "a9"]


def test_an_evicted_window_alone_begins_again() -> None:
    made = scheduler(n_slots=1, window=4)
    made.extend("a", 0, 6)
    while made.waiting:
        run(made, 9)
    made.extend("b", 0, 1)
    run(made, 9)
    made.extend("a", 6, 7)
    assert run(made, 9) == ["a4", "a5", "a6"]
    made.crop("a", 3)
    made.extend("a", 3, 7)
    assert run(made, 9) == ["a0", "a1", "a2", "a3"]


def test_without_chains_a_stay_has_one_row_a_tick() -> None:
    made = scheduler(chained=False)
    for key in "ab":
        made.extend(key, 0, 3)
    assert [run(made, 9) for _ in range(3)] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]


def test_the_check_finds_what_does_not_fit_together() -> None:
    def damaged() -> Scheduler:
        made = rebuilt("a", "b")
        run(made, 16)
        made.check_integrity("ab")
        return made

    with pytest.raises(SlotError):
        damaged().check_integrity("a")
    made = damaged()
    made.stays["a"].lease = None
    with pytest.raises(SlotError):
        made.check_integrity("ab")
    made = damaged()
    made.stays["a"].reached += 1
    with pytest.raises(SlotError):
        made.check_integrity("ab")
    made = damaged()
    made._queued["a"] = made._live
    with pytest.raises(SlotError):
        made.check_integrity("ab")


def test_a_slot_of_another_version_is_not_written() -> None:
    made = rebuilt("a")
    run(made, 2)
    made.slots._owned["a"] = Lease(0, 7)
    with pytest.raises(SlotError):
        made.next_tick(2)
