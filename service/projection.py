"""From the log entries of an episode to what is known about it. Pure functions, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS, Episode, Statics
from llm4ehr.variables import VARIABLE_INDEX, UnitError
from service.entries import ITEM_KINDS, Entry, from_us, to_us
from service.units import EventVocabulary, convert_event

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
    """Event values are as they were sent: `model_episode` has them in the model's units."""
    event_units: tuple[str | None, ...]
    """Unit of each event of `episode`, as it was sent."""
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

    items = _Items([e for e in timeline if e.kind in ITEM_KINDS], to_us(admitted_at))
    live, counts = _live(timeline, items.entries)
    hour = items.hour[live]
    early, late = hour < 0, hour >= MAX_HOURS
    after = ~early & ~late & (items.placed_us[live] > limit_us)
    reasons = {"before-admission": early, "beyond-horizon": late, "after-discharge": after}
    used = live[~(early | late | after)]

    newest_us = np.full(MAX_HOURS, _NEVER, dtype=np.int64)
    np.maximum.at(newest_us, items.hour[used], items.effective_us[used])
    newest_us = np.maximum.accumulate(newest_us)
    head_hour = int(items.hour[used].max(initial=-1))
    known_us, touched_us = _history(timeline, items)
    statics = Statics(**admission["statics"])
    episode, event_units = _arrays(timeline[0].episode_id, items, used, head_hour + 1, statics)
    return EpisodeView(
        episode_id=timeline[0].episode_id,
        seq=timeline[-1].seq,
        recorded_at=timeline[-1].recorded_at,
        admitted_at=admitted_at,
        discharged_at=discharged_at,
        deleted=any(e.kind == "deletion" for e in timeline),
        statics=statics,
        episode=episode,
        event_units=event_units,
        head_hour=head_hour,
        newest_effective_at=from_us(int(newest_us[-1])) if used.size else None,
        counts=counts,
        ignored={reason: int(n) for reason, which in reasons.items() if (n := which.sum())},
        newest_us=newest_us,
        known_us=known_us,
        touched_us=touched_us,
    )


def _discharge(entry: Entry) -> datetime | None:
    """A discharge without a time takes back an earlier one."""
    value = entry.payload["discharged_at"]
    return None if value is None else datetime.fromisoformat(value)


def _live(timeline: list[Entry], items: list[Entry]) -> tuple[NDArray[np.intp], dict[str, int]]:
    """Places of the live items in `items`, and how many are live, corrected and withdrawn."""
    withdrawn = {e.target for e in timeline if e.kind == "withdrawal"}
    # In order of seq, so the last correction of a target is the one that remains.
    corrected_by = {e.target: e.seq for e in items if e.target is not None}
    contents = [e.payload["content"] for e in items]
    identified = {c for e, c in zip(items, contents, strict=True) if e.item_id != c}
    live: list[int] = []
    counts = {"observations": 0, "events": 0, "corrected": 0, "withdrawn": 0}
    for i, (entry, content) in enumerate(zip(items, contents, strict=True)):
        item_id = entry.item_id
        outdated = entry.target is not None and corrected_by[entry.target] != entry.seq
        if item_id == content and content in identified:
            continue
        if item_id in withdrawn or content in withdrawn:
            counts["withdrawn"] += 1
        elif outdated or item_id in corrected_by or content in corrected_by:
            counts["corrected"] += 1
        else:
            counts["observations" if entry.kind == "observation" else "events"] += 1
            live.append(i)
    return np.array(live, dtype=np.intp), counts


def _effective(entry: Entry) -> int:
    assert entry.effective_us is not None
    return entry.effective_us


class _Items:
    """The items of an episode and where they stand in time: the later of effective and available.

    A correction that does not say when it became available was so together with its target.
    """

    def __init__(self, entries: list[Entry], admitted_us: int) -> None:
        self.entries = entries
        self._admitted_us = admitted_us
        self._by_name = {entries[i].payload["content"]: i for i in reversed(range(len(entries)))}
        self._by_name |= {e.item_id: i for i, e in enumerate(entries)}
        n = len(entries)
        self.effective_us = np.fromiter((_effective(e) for e in entries), np.int64, n)
        available = (self._available_us(e) for e in entries)
        self.placed_us = np.maximum(self.effective_us, np.fromiter(available, np.int64, n))
        self.hour = self.hour_of(self.placed_us)  # may lie outside 0..199
        self.hours = (self.placed_us - admitted_us) / HOUR_US

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
                return _NEVER
            entry = self.entries[target]
        return _NEVER if entry.available_us is None else entry.available_us


def _history(timeline: list[Entry], items: _Items) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`known_us` and `touched_us` of the view."""
    n = len(items.entries)
    recorded_us = np.fromiter((e.recorded_us for e in items.entries), np.int64, n)
    # One cell more: what lies beyond the last hour touches none, but was known after all of them.
    known_us = np.full(MAX_HOURS + 1, _NOT_YET, dtype=np.int64)
    touched_us = np.full(MAX_HOURS + 1, _NEVER, dtype=np.int64)
    cell = np.clip(items.hour, 0, MAX_HOURS)
    np.maximum.at(touched_us, cell, recorded_us)
    inside = items.hour >= 0
    np.minimum.at(known_us, cell[inside], recorded_us[inside])

    def touch(hour: int, at_us: int) -> None:
        hour = min(max(hour, 0), MAX_HOURS)
        touched_us[hour] = max(int(touched_us[hour]), at_us)

    first_hour = items.hour_of(items.effective_us)
    for i, entry in enumerate(items.entries):
        target = items.target(entry)
        if target is not None:
            # The pair took effect when the later of the two came, and may have moved a correction
            # that stood at its effective time until then.
            touch(
                int(min(first_hour[i], items.hour[i], items.hour[target])),
                int(max(recorded_us[i], recorded_us[target])),
            )
    admission: Entry | None = None
    discharged_us = _NOT_YET
    for entry in timeline:
        if entry.kind == "withdrawal":
            target = items.target(entry)
            if target is not None:
                touch(int(items.hour[target]), entry.recorded_us)
        elif entry.kind == "admission":
            if admission is not None and admission.payload != entry.payload:
                touch(0, entry.recorded_us)
            admission = entry
        elif entry.kind == "discharge":
            # Only items between the former and the new discharge appear or vanish.
            at = _discharge(entry)
            before_us, discharged_us = discharged_us, _NOT_YET if at is None else to_us(at)
            low, high = sorted((before_us, discharged_us))
            moved = (items.placed_us > low) & (items.placed_us <= high)
            moved &= np.fromiter((e.seq < entry.seq for e in items.entries), np.bool_, n)
            if moved.any():
                touch(int(items.hour[moved].min()), entry.recorded_us)
    return (
        np.minimum.accumulate(known_us[::-1])[::-1][:MAX_HOURS],
        np.maximum.accumulate(touched_us)[:MAX_HOURS],
    )


def _arrays(
    episode_id: str, items: _Items, used: NDArray[np.intp], n_hours: int, statics: Statics
) -> tuple[Episode, tuple[str | None, ...]]:
    """The episode, sorted by content so that equal facts give equal arrays, and its event units."""
    rows = [(i, items.entries[i].kind, items.entries[i].payload) for i in used.tolist()]
    observations = [(i, payload) for i, kind, payload in rows if kind == "observation"]
    events = [(i, payload) for i, kind, payload in rows if kind == "event"]
    obs_hours = items.hours[[i for i, _ in observations]]
    variable = np.array([VARIABLE_INDEX[p["variable"]] for _, p in observations], dtype=np.int16)
    priority = np.array([p["priority"] for _, p in observations], dtype=np.int8)
    value = np.array([p["value"] for _, p in observations], dtype=np.float64)
    order = np.lexsort((value, priority, variable, obs_hours))
    ev_hours = items.hours[[i for i, _ in events]]
    code = np.array([p["code"] for _, p in events], dtype=np.object_)
    ev_value = np.array(
        [np.nan if p["value"] is None else p["value"] for _, p in events], dtype=np.float64
    )
    units = [p["unit"] for _, p in events]
    said = np.array([unit or "" for unit in units], dtype=np.str_)
    ev_order = np.lexsort((said, ev_value, code.astype(str), ev_hours))
    episode = Episode(
        episode_id=episode_id,
        n_hours=n_hours,
        obs_variable=variable[order],
        obs_hours=obs_hours[order],
        obs_value=value[order],
        obs_priority=priority[order],
        ev_code=code[ev_order],
        ev_hours=ev_hours[ev_order],
        ev_value=ev_value[ev_order],
        statics=statics,
    )
    return episode, tuple(units[i] for i in ev_order.tolist())


def model_episode(view: EpisodeView, vocabulary: EventVocabulary) -> Episode:
    """The episode with its event values in the units of the model that will read it.

    The log keeps what was sent, so that another model, fed in other units, reads the same facts. An
    event whose value does not convert keeps its place and loses its value.
    """
    value = view.episode.ev_value.copy()
    for i, (code, unit) in enumerate(zip(view.episode.ev_code, view.event_units, strict=True)):
        entry = vocabulary.entry(code)
        if entry is None or entry.unit is None or entry.unit == unit or np.isnan(value[i]):
            continue
        try:
            value[i] = convert_event(code, float(value[i]), unit, entry.unit)
        except UnitError:
            value[i] = np.nan
    return replace(view.episode, ev_value=value)
