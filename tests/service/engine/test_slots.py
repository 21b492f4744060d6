"""The slot table: every slot has one owner, and the least recently used gives way."""

from __future__ import annotations

import pytest

from service.engine.slots import Lease, SlotError, SlotTable


def filled(n: int) -> SlotTable:
    """Slots owned by "a", "b", ... in that order."""
    table = SlotTable(n)
    for owner in "abcdefgh"[:n]:
        table.acquire(owner, ())
    return table


def test_free_slots_go_first_and_nobody_loses_one() -> None:
    table = SlotTable(3)
    acquired = [table.acquire(owner, ()) for owner in "abc"]
    assert [evicted for _, evicted in acquired] == [None] * 3
    assert sorted(lease.slot for lease, _ in acquired) == [0, 1, 2]
    assert [table.lease(owner) for owner in "abc"] == [lease for lease, _ in acquired]
    assert (table.used, table.evictions) == (3, 0)


def test_the_least_recently_used_gives_way() -> None:
    table = filled(3)
    table.lease("a")  # used again
    held = table.lease("b")
    table.lease("b")
    order = [table.acquire(owner, ()) for owner in "xyz"]
    assert [evicted for _, evicted in order] == ["c", "a", "b"]
    assert order[2][0] == Lease(held.slot, held.version + 1)
    assert table.evictions == 3
    assert [table.lease(owner) for owner in "abc"] == [None] * 3


def test_busy_owners_keep_their_slots() -> None:
    table = filled(3)
    held = table.lease("a"), table.lease("c")
    assert table.acquire("x", {"a", "c"}) == (Lease(1, 2), "b")
    assert table.acquire("y", {"a", "c", "x"}) is None
    assert (table.lease("a"), table.lease("c")) == held
    assert (table.lease("y"), table.evictions) == (None, 1)


def test_an_owner_has_one_slot() -> None:
    table = filled(2)
    with pytest.raises(SlotError):
        table.acquire("a", ())
    table.check_integrity()


def test_a_slot_given_back_is_free_again() -> None:
    table = filled(2)
    slot, version = table.lease("b")
    table.release("b")
    table.release("b")
    table.release("never")
    assert (table.used, table.lease("b")) == (1, None)
    table.check_integrity()
    assert table.acquire("x", {"a"}) == (Lease(slot, version + 1), None)


def test_the_check_finds_a_lost_and_a_shared_slot() -> None:
    for damage in ({"a": 0}, {"a": 0, "b": 0}, {"a": 0, "b": 2}):
        table = filled(2)
        table.check_integrity()
        table._owned.clear()
        table._owned.update({owner: Lease(slot, 1) for owner, slot in damage.items()})
        with pytest.raises(SlotError):
            table.check_integrity()
    table = filled(2)
    table._free.append(1)
    with pytest.raises(SlotError):
        table.check_integrity()
    table = filled(2)
    table._versions[0] += 1
    with pytest.raises(SlotError):
        table.check_integrity()


@pytest.mark.parametrize("n", [0, -1])
def test_a_table_has_a_slot(n: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        SlotTable(n)
