"""From the log entries of an episode to what is known about it. Pure functions, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS, Episode, Statics
from llm4ehr.variables import VARIABLE_INDEX
from service.entries import ITEM_KINDS, Entry, from_us, to_us

HourStatus = Literal["preliminary", "final", "amended"]

HOUR_US = 3_600_000_000
_NEVER = -(2**63)
_NOT_YET = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeView:
    """An episode as a set of log entries describes it.

    The arrays have one cell for each hour 0..199 and hold microseconds since 1970, UTC:
    `newest_us` the latest effective time among live items placed in that hour or before,
    `known_us` when data in that hour or later was first recorded, `touched_us` when an entry that
    bears on that hour or an earlier one was last recorded.
    """

    episode_id: str
    seq: int
    recorded_at: datetime
    admitted_at: datetime
    discharged_at: datetime | None
    deleted: bool
    statics: Statics
    episode: Episode
    head_hour: int
    """Last hour with a live item, -1 if there is none."""
    newest_effective_at: datetime | None
    counts: Mapping[str, int]
    """Live "observations" and "events", and items "corrected" and "withdrawn"."""
    ignored: Mapping[str, int]
    """Live items that the model does not see, by reason."""
    newest_us: NDArray[np.int64]
    known_us: NDArray[np.int64]
    touched_us: NDArray[np.int64]

    def hour_start(self, hour: int) -> datetime:
        return self.admitted_at + timedelta(hours=hour)

    def hour_end(self, hour: int) -> datetime:
        return self.admitted_at + timedelta(hours=hour + 1)

    def hour_at(self, instant: datetime) -> int:
        """The hour bin an instant falls into; negative before admission, no upper bound."""
        return (to_us(instant) - to_us(self.admitted_at)) // HOUR_US

    def newest_data_at(self, hour: int) -> datetime | None:
        """Effective time of the newest live item placed in `hour` or before."""
        newest = int(self.newest_us[hour])
        return None if newest == _NEVER else from_us(newest)


def hour_status(
    view: EpisodeView, hour: int, now: datetime, allowed_lateness: timedelta
) -> HourStatus:
    """Whether the answer for an hour may still change, stands, or was changed after it stood.

    An hour stands once `allowed_lateness` has passed after its end. It is amended if, from then on,
    an entry bearing on it or on an earlier hour was recorded while data in it or a later hour had
    been on record before: someone may have read the former answer.
    """
    stands_at = view.hour_end(hour) + allowed_lateness
    if now < stands_at:
        return "preliminary"
    touched = int(view.touched_us[hour])
    if touched >= to_us(stands_at) and touched > int(view.known_us[hour]):
        return "amended"
    return "final"


def episode_at(entries: Sequence[Entry]) -> EpisodeView:
    """Read an episode off its entries, given in any order. Raises ValueError without an admission.

    An item is live unless a withdrawal or a correction names it; of several corrections of one
    target the last recorded is live. What was replaced stays replaced: withdrawing a correction
    does not bring its target back. An item without a client's id yields to one of the same content
    that has an id, so that the two may arrive in either order.
    """
    timeline = sorted(entries, key=lambda e: e.seq)
    admissions = [e for e in timeline if e.kind == "admission"]
    if not admissions:
        raise ValueError("an episode begins with an admission")
    admission = admissions[-1].payload
    admitted_at = datetime.fromisoformat(admission["admitted_at"])
    discharges = [e for e in timeline if e.kind == "discharge"]
    discharged_at = _discharge(discharges[-1]) if discharges else None
    limit_us = _NOT_YET if discharged_at is None else to_us(discharged_at)

    items = [e for e in timeline if e.kind in ITEM_KINDS]
    places = _Places(items, to_us(admitted_at))
    live, counts = _live(timeline, items)
    used: list[Entry] = []
    ignored: Counter[str] = Counter()
    for entry in live:
        hour = places.hour[entry.seq]
        if hour < 0:
            ignored["before-admission"] += 1
        elif hour >= MAX_HOURS:
            ignored["beyond-horizon"] += 1
        elif places.placed_us[entry.seq] > limit_us:
            ignored["after-discharge"] += 1
        else:
            used.append(entry)

    newest = [_NEVER] * MAX_HOURS
    for entry in used:
        hour = places.hour[entry.seq]
        newest[hour] = max(newest[hour], places.effective_us[entry.seq])
    newest_us = np.maximum.accumulate(np.array(newest, dtype=np.int64))
    head_hour = max((places.hour[e.seq] for e in used), default=-1)
    known_us, touched_us = _history(timeline, items, places)
    statics = Statics(**admission["statics"])
    return EpisodeView(
        episode_id=timeline[0].episode_id,
        seq=timeline[-1].seq,
        recorded_at=timeline[-1].recorded_at,
        admitted_at=admitted_at,
        discharged_at=discharged_at,
        deleted=any(e.kind == "deletion" for e in timeline),
        statics=statics,
        episode=_arrays(timeline[0].episode_id, used, places, head_hour + 1, statics),
        head_hour=head_hour,
        newest_effective_at=from_us(int(newest_us[-1])) if used else None,
        counts=counts,
        ignored=dict(ignored),
        newest_us=newest_us,
        known_us=known_us,
        touched_us=touched_us,
    )


def _discharge(entry: Entry) -> datetime | None:
    """A discharge without a time takes back an earlier one."""
    value = entry.payload["discharged_at"]
    return None if value is None else datetime.fromisoformat(value)


def _live(timeline: list[Entry], items: list[Entry]) -> tuple[list[Entry], dict[str, int]]:
    """The live items, and how many items are live, corrected and withdrawn."""
    withdrawn = {e.target for e in timeline if e.kind == "withdrawal"}
    # In order of seq, so the last correction of a target is the one that remains.
    corrected_by = {e.target: e.seq for e in items if e.target is not None}
    contents = {e.seq: e.payload["content"] for e in items}
    identified = {contents[e.seq] for e in items if e.item_id != contents[e.seq]}
    live: list[Entry] = []
    counts = {"observations": 0, "events": 0, "corrected": 0, "withdrawn": 0}
    for entry in items:
        item_id, content = entry.item_id, contents[entry.seq]
        outdated = entry.target is not None and corrected_by[entry.target] != entry.seq
        if item_id == content and content in identified:
            continue
        if item_id in withdrawn or content in withdrawn:
            counts["withdrawn"] += 1
        elif outdated or item_id in corrected_by or content in corrected_by:
            counts["corrected"] += 1
        else:
            counts["observations" if entry.kind == "observation" else "events"] += 1
            live.append(entry)
    return live, counts


class _Places:
    """Where items stand in time: the later of effective and available, by `seq`.

    A correction that does not say when it became available was so together with its target.
    """

    def __init__(self, items: list[Entry], admitted_us: int) -> None:
        self._admitted_us = admitted_us
        self._by_name = {e.payload["content"]: e for e in reversed(items)}
        self._by_name |= {e.item_id: e for e in items}
        self.effective_us: dict[int, int] = {}
        self.placed_us: dict[int, int] = {}
        self.hour: dict[int, int] = {}
        """Hour bin; may lie outside 0..199."""
        for entry in items:
            assert entry.effective_at is not None
            available = entry.available_at
            if available is None and entry.target is not None:
                available = self._inherited(entry)
            placed = effective = to_us(entry.effective_at)
            if available is not None:
                placed = max(effective, to_us(available))
            self.effective_us[entry.seq] = effective
            self.placed_us[entry.seq] = placed
            self.hour[entry.seq] = self.hour_of(placed)

    def target(self, entry: Entry) -> Entry | None:
        """The item that an entry names, if it has arrived."""
        return None if entry.target is None else self._by_name.get(entry.target)

    def hours(self, entry: Entry) -> float:
        """Hours since admission, as the model reads them."""
        return (self.placed_us[entry.seq] - self._admitted_us) / HOUR_US

    def hour_of(self, instant_us: int) -> int:
        return (instant_us - self._admitted_us) // HOUR_US

    def _inherited(self, entry: Entry) -> datetime | None:
        visited = {entry.seq}
        target = self.target(entry)
        while target is not None and target.seq not in visited:
            if target.available_at is not None:
                return target.available_at
            visited.add(target.seq)
            target = self.target(target)
        return None


def _history(
    timeline: list[Entry], items: list[Entry], places: _Places
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`known_us` and `touched_us` of the view."""
    known = [_NOT_YET] * MAX_HOURS
    touched = [_NEVER] * MAX_HOURS

    def touch(hour: int, recorded_us: int) -> None:
        if hour < MAX_HOURS:
            hour = max(hour, 0)
            touched[hour] = max(touched[hour], recorded_us)

    admission: Entry | None = None
    discharged_us = _NOT_YET
    for entry in timeline:
        recorded_us = to_us(entry.recorded_at)
        if entry.kind in ITEM_KINDS:
            hour = places.hour[entry.seq]
            touch(hour, recorded_us)
            if hour >= 0:
                last = min(hour, MAX_HOURS - 1)
                known[last] = min(known[last], recorded_us)
            target = places.target(entry)
            if target is not None:
                # The pair took effect when the later of the two came, and may have moved a
                # correction that stood at its effective time until then.
                first = places.hour_of(places.effective_us[entry.seq])
                touch(
                    min(first, hour, places.hour[target.seq]),
                    max(recorded_us, to_us(target.recorded_at)),
                )
        elif entry.kind == "withdrawal":
            target = places.target(entry)
            if target is not None:
                touch(places.hour[target.seq], recorded_us)
        elif entry.kind == "admission":
            if admission is not None and admission.payload != entry.payload:
                touch(0, recorded_us)
            admission = entry
        elif entry.kind == "discharge":
            # Only items between the former and the new discharge appear or vanish.
            at = _discharge(entry)
            before_us, discharged_us = discharged_us, _NOT_YET if at is None else to_us(at)
            low, high = sorted((before_us, discharged_us))
            moved = [
                places.hour[e.seq]
                for e in items
                if e.seq < entry.seq and low < places.placed_us[e.seq] <= high
            ]
            if moved:
                touch(min(moved), recorded_us)
    return (
        np.minimum.accumulate(np.array(known[::-1], dtype=np.int64))[::-1],
        np.maximum.accumulate(np.array(touched, dtype=np.int64)),
    )


def _arrays(
    episode_id: str, used: list[Entry], places: _Places, n_hours: int, statics: Statics
) -> Episode:
    """The model's episode, sorted by content so that equal facts give equal arrays."""
    observations = sorted(
        (
            places.hours(e),
            VARIABLE_INDEX[e.payload["variable"]],
            e.payload["priority"],
            e.payload["value"],
        )
        for e in used
        if e.kind == "observation"
    )
    events = sorted(
        (places.hours(e), e.payload["code"], value is not None, 0.0 if value is None else value)
        for e in used
        if e.kind == "event"
        for value in [e.payload["value"]]
    )
    return Episode(
        episode_id=episode_id,
        n_hours=n_hours,
        obs_variable=np.array([o[1] for o in observations], dtype=np.int16),
        obs_hours=np.array([o[0] for o in observations], dtype=np.float64),
        obs_value=np.array([o[3] for o in observations], dtype=np.float64),
        obs_priority=np.array([o[2] for o in observations], dtype=np.int8),
        ev_code=np.array([e[1] for e in events], dtype=object),
        ev_hours=np.array([e[0] for e in events], dtype=np.float64),
        ev_value=np.array([e[3] if e[2] else np.nan for e in events], dtype=np.float64),
        statics=statics,
    )
