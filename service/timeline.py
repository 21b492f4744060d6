"""The entries of an episode in time: where its items stand, which are live, what was touched."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS
from service.entries import ITEM_KINDS, Entry, to_us

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
        self.recorded_us = _column([e.recorded_us for e in entries])
        self.effective_us = _column([e.effective_us for e in entries])
        available = [e.available_us if e.target is None else self._available_us(e) for e in entries]
        available_us = _column([NEVER if at is None else at for at in available])
        self.naming = [(i, e) for i, e in enumerate(entries) if e.target is not None]
        """Places of the corrections, and these themselves."""
        self.placed_us = np.maximum(self.effective_us, available_us)
        self.hour = self.hour_of(self.placed_us)  # may lie outside 0..199
        self.hours = (self.placed_us - admitted_us) / HOUR_US

    @cached_property
    def _by_name(self) -> dict[str | None, int]:
        """Places by id, and by content that is no id: there the first of them."""
        names: dict[str | None, int] = {}
        for i, entry in enumerate(self.entries):
            names.setdefault(entry.payload["content"], i)
        return names | {e.item_id: i for i, e in enumerate(self.entries)}

    def payloads(self, places: NDArray[np.intp]) -> list[Mapping[str, Any]]:
        return [self.entries[i].payload for i in places.tolist()]

    def target(self, entry: Entry) -> int | None:
        """Place of the item that an entry names, if it has arrived."""
        return None if entry.target is None else self._by_name.get(entry.target)

    def hour_of(self, instant_us: NDArray[np.int64]) -> NDArray[np.int64]:
        return (instant_us - self._admitted_us) // HOUR_US

    def _available_us(self, entry: Entry) -> int | None:
        visited = set()
        while entry.available_us is None:
            target = self.target(entry)
            if target is None or entry.seq in visited:
                return None
            visited.add(entry.seq)
            entry = self.entries[target]
        return entry.available_us


def live_items(timeline: list[Entry], items: Items) -> tuple[NDArray[np.intp], dict[str, int]]:
    """Places of the live items, and how many are corrected and withdrawn."""
    withdrawn = {e.target for e in timeline if e.kind == "withdrawal"}
    # In order of seq, so the last correction of a target is the one that remains.
    corrected_by = {e.target: e.seq for _, e in items.naming}
    outdated = {e.item_id for _, e in items.naming if corrected_by[e.target] != e.seq}
    replaced = outdated | corrected_by.keys()
    names = [(e.item_id, e.payload["content"]) for e in items.entries]
    identified = {content for item_id, content in names if item_id != content}
    live = [
        i for i, (name, content) in enumerate(names) if name != content or name not in identified
    ]
    counts = {"corrected": 0, "withdrawn": 0}
    if withdrawn or replaced:
        there, live = live, []
        for i in there:
            name, content = names[i]
            if name in withdrawn or content in withdrawn:
                counts["withdrawn"] += 1
            elif name in replaced or content in corrected_by:
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
    for i, entry in items.naming:
        target = items.target(entry)
        if target is not None:
            # The pair took effect when the later of the two came, and may have moved a correction
            # that stood at its effective time until then.
            hour = min(first_hour[i], items.hour[i], items.hour[target])
            touches.append((int(hour), int(max(recorded_us[i], recorded_us[target]))))
    admission: Entry | None = None
    discharged_us = NOT_YET
    for entry in [e for e in timeline if e.kind not in ITEM_KINDS]:
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
            moved &= _column([e.seq for e in items.entries]) < entry.seq
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


def _column(values: list[Any]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
