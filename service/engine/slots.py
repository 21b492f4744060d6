"""Which episode owns which KV slot. No torch: tested without a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import NamedTuple


class SlotError(RuntimeError):
    """A slot is owned twice or lost: one patient could see another's state."""


class Lease(NamedTuple):
    """A slot in the hands of one owner. `version` counts how often the slot was given out."""

    slot: int
    version: int


class SlotTable:
    """A fixed number of slots, given out to episodes, taken back from the least recently used."""

    def __init__(self, n_slots: int) -> None:
        if n_slots < 1:
            raise ValueError("at least one slot is needed")
        self.n_slots = n_slots
        self.evictions = 0
        self._free = list(range(n_slots - 1, -1, -1))
        self._versions = [0] * n_slots
        self._owned: OrderedDict[Hashable, Lease] = OrderedDict()  # least recently used first

    @property
    def used(self) -> int:
        """Slots that an episode owns."""
        return len(self._owned)

    def lease(self, owner: Hashable) -> Lease | None:
        """The owner's slot, if it has one; counts as a use."""
        if owner in self._owned:
            self._owned.move_to_end(owner)
        return self._owned.get(owner)

    def acquire(
        self, owner: Hashable, busy: Collection[Hashable]
    ) -> tuple[Lease, Hashable | None] | None:
        """A slot for an owner that has none, and whom it was taken from, if from anybody.

        Owners in `busy` keep theirs. None when every slot is busy.
        """
        if owner in self._owned:
            raise SlotError("this owner has a slot already")
        evicted: Hashable | None = None
        if self._free:
            slot = self._free.pop()
        else:
            evicted = next((o for o in self._owned if o not in busy), None)
            if evicted is None:
                return None
            slot = self._owned.pop(evicted).slot
            self.evictions += 1
        self._versions[slot] += 1
        lease = self._owned[owner] = Lease(slot, self._versions[slot])
        return lease, evicted

    def release(self, owner: Hashable) -> None:
        """Give the owner's slot back, if it has one."""
        lease = self._owned.pop(owner, None)
        if lease is not None:
            self._free.append(lease.slot)

    def check_integrity(self) -> None:
        """Raise SlotError unless every slot is either free or owned once, in its last version."""
        slots = [*self._free, *(lease.slot for lease in self._owned.values())]
        if sorted(slots) != list(range(self.n_slots)):
            raise SlotError("a slot is owned twice or lost")
        if any(version != self._versions[slot] for slot, version in self._owned.values()):
            raise SlotError("an owner holds a former version of its slot")
