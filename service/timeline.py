"""The entries of an episode in time: where its items stand, which are live, what was touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS
from service.entries import Entry, to_us

HOUR_US = 3_600_000_000
NEVER = -(2**63)
NOT_YET = 2**63 - 1


class Items:
    """The items of an episode and where they stand in time: the later of effective and available.

    A correction that does not say when it became available was so together with its target.
    """

    def __init__(self, entries: list[Entry], admitted_us: int) -> None:
        self.entries = entries
        self._admitted_us = admitted_us
        self._by_name = {entries[i].payload["content"]: i for i in reversed(range(len(entries)))}
        self._by_name |= {e.item_id: i for i, e in enumerate(entries)}
        n = len(entries)
        self.recorded_us = np.fromiter((e.recorded_us for e in entries), np.int64, n)
        self.seq = np.fromiter((e.seq for e in entries), np.int64, n)
        self.effective_us = np.fromiter((_effective(e) for e in entries), np.int64, n)
        available = (self._available_us(e) for e in entries)
        self.placed_us = np.maximum(self.effective_us, np.fromiter(available, np.int64, n))
        self.hour = self.hour_of(self.placed_us)  # may lie outside 0..199
        self.hours = (self.placed_us - admitted_us) / HOUR_US

    def payloads(self, places: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self.entries[i].payload for i in places]

    def target(self, entry: Entry) -> int | None:
        """Place of the item that an entry names, if it has arrived."""
        return None if entry.target is None else self._by_name.get(entry.target)

    def hour_of(self, instant_us: NDArray[np.int64]) -> NDArray[np.int64]:
        return (instant_us - self._admitted_us) // HOUR_US

    def _available_us(self, entry: Entry) -> int:
        visited = set()
        while entry.available_us is None and entry.seq not in visited:
            visited.add(entry.seq)
            target = self.target(entry)
            if target is None:
                return NEVER
            entry = self.entries[target]
        return NEVER if entry.available_us is None else entry.available_us


def live_items(timeline: list[Entry], items: Items) -> tuple[NDArray[np.intp], dict[str, int]]:
    """Places of the live items, and how many are corrected and withdrawn."""
    withdrawn = {e.target for e in timeline if e.kind == "withdrawal"}
    # In order of seq, so the last correction of a target is the one that remains.
    corrected_by = {e.target: e.seq for e in items.entries if e.target is not None}
    contents = [e.payload["content"] for e in items.entries]
    identified = {c for e, c in zip(items.entries, contents, strict=True) if e.item_id != c}
    live: list[int] = []
    counts = {"corrected": 0, "withdrawn": 0}
    for i, (entry, content) in enumerate(zip(items.entries, contents, strict=True)):
        item_id = entry.item_id
        outdated = entry.target is not None and corrected_by[entry.target] != entry.seq
        if item_id == content and content in identified:
            continue
        if item_id in withdrawn or content in withdrawn:
            counts["withdrawn"] += 1
        elif outdated or item_id in corrected_by or content in corrected_by:
            counts["corrected"] += 1
        else:
            live.append(i)
    return np.array(live, dtype=np.intp), counts


def changes(timeline: list[Entry], items: Items) -> NDArray[np.int64]:
    """For each hour, when an entry that changes items of that hour or before it was last recorded.

    That is what `touched_us` has besides the items themselves.
    """
    touches: list[tuple[int, int]] = []  # hour, instant
    recorded_us = items.recorded_us
    first_hour = items.hour_of(items.effective_us)
    for i, entry in enumerate(items.entries):
        target = items.target(entry)
        if target is not None:
            # The pair took effect when the later of the two came, and may have moved a correction
            # that stood at its effective time until then.
            hour = min(first_hour[i], items.hour[i], items.hour[target])
            touches.append((int(hour), int(max(recorded_us[i], recorded_us[target]))))
    admission: Entry | None = None
    discharged_us = NOT_YET
    for entry in timeline:
        if entry.kind == "withdrawal":
            target = items.target(entry)
            if target is not None:
                touches.append((int(items.hour[target]), entry.recorded_us))
        elif entry.kind == "admission":
            if admission is not None and admission.payload != entry.payload:
                touches.append((0, entry.recorded_us))
            admission = entry
        elif entry.kind == "discharge":
            # Only items between the former and the new discharge appear or vanish.
            at = discharge_of(entry)
            before_us, discharged_us = discharged_us, NOT_YET if at is None else to_us(at)
            low, high = sorted((before_us, discharged_us))
            moved = (items.placed_us > low) & (items.placed_us <= high)
            moved &= items.seq < entry.seq
            if moved.any():
                touches.append((int(items.hour[moved].min()), entry.recorded_us))
    hours, instants = zip(*touches, strict=True) if touches else ((), ())
    return latest_up_to(np.array(hours, dtype=np.int64), np.array(instants, dtype=np.int64))


def latest_up_to(hour: NDArray[np.int64], at_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of the 200 hours the latest instant of that hour and those before it."""
    # One cell more: what lies beyond the last hour bears on none of them.
    cells = np.full(MAX_HOURS + 1, NEVER, dtype=np.int64)
    np.maximum.at(cells, np.clip(hour, 0, MAX_HOURS), at_us)
    return np.maximum.accumulate(cells)[:MAX_HOURS]


def earliest_from(hour: NDArray[np.int64], at_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of the 200 hours the earliest instant of that hour and any later one."""
    cells = np.full(MAX_HOURS + 1, NOT_YET, dtype=np.int64)
    inside = hour >= 0
    np.minimum.at(cells, np.minimum(hour[inside], MAX_HOURS), at_us[inside])
    return np.minimum.accumulate(cells[::-1])[::-1][:MAX_HOURS]


def discharge_of(entry: Entry) -> datetime | None:
    """A discharge without a time takes back an earlier one."""
    value = entry.payload["discharged_at"]
    return None if value is None else datetime.fromisoformat(value)


def _effective(entry: Entry) -> int:
    assert entry.effective_us is not None
    return entry.effective_us
