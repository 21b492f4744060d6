"""From the log entries of an episode to what is known about it. Pure functions, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS, Episode, Statics, empty_episode
from service.arrays import in_units_of, with_events, with_observations
from service.entries import ITEM_KINDS, Entry, from_us, to_us
from service.timeline import (
    HOUR_US,
    NEVER,
    NOT_YET,
    Items,
    changes,
    discharge_of,
    earliest_from,
    latest_up_to,
    live_items,
)
from service.units import EventVocabulary

HourStatus = Literal["preliminary", "final", "amended"]


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
    event_pairs: frozenset[tuple[str, str | None]]
    """The distinct pairs of code and unit among them."""
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
        return None if newest == NEVER else from_us(newest)


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
    timeline = sorted(entries, key=attrgetter("seq"))
    admissions = [e for e in timeline if e.kind == "admission"]
    if not admissions:
        raise ValueError("an episode begins with an admission")
    admission = admissions[-1].payload
    discharges = [e for e in timeline if e.kind == "discharge"]
    empty = _without_items(
        timeline[0].episode_id,
        admitted_at=datetime.fromisoformat(admission["admitted_at"]),
        discharged_at=discharge_of(discharges[-1]) if discharges else None,
        deleted=any(e.kind == "deletion" for e in timeline),
        statics=Statics(**admission["statics"]),
    )
    items = Items([e for e in timeline if e.kind in ITEM_KINDS], to_us(empty.admitted_at))
    live, replaced = live_items(timeline, items)
    view = _with_items(empty, items, live, timeline[-1])
    return replace(
        view,
        counts={**view.counts, **replaced},
        touched_us=np.maximum(view.touched_us, changes(timeline, items)),
    )


def extended(view: EpisodeView, entries: Sequence[Entry]) -> EpisodeView:
    """The view after further entries, to the bit what `episode_at` reads off all of them.

    They must follow the last one in order, and be items that stand alone: they name no other item,
    no entry names them, and no other item has their id or content. The work grows with what is
    new and with what lies later in time, not with the stay.
    """
    items = Items(list(entries), to_us(view.admitted_at))
    return _with_items(view, items, np.arange(len(items.entries)), entries[-1])


def _without_items(
    episode_id: str,
    *,
    admitted_at: datetime,
    discharged_at: datetime | None,
    deleted: bool,
    statics: Statics,
) -> EpisodeView:
    return EpisodeView(
        episode_id=episode_id,
        seq=0,
        recorded_at=admitted_at,
        admitted_at=admitted_at,
        discharged_at=discharged_at,
        deleted=deleted,
        statics=statics,
        episode=empty_episode(episode_id, statics=statics),
        event_units=(),
        event_pairs=frozenset(),
        head_hour=-1,
        newest_effective_at=None,
        counts={"observations": 0, "events": 0, "corrected": 0, "withdrawn": 0},
        ignored={},
        newest_us=np.full(MAX_HOURS, NEVER, dtype=np.int64),
        known_us=np.full(MAX_HOURS, NOT_YET, dtype=np.int64),
        touched_us=np.full(MAX_HOURS, NEVER, dtype=np.int64),
    )


def _with_items(
    view: EpisodeView, items: Items, live: NDArray[np.intp], last: Entry
) -> EpisodeView:
    """The view after `last` with further items, some of them live."""
    limit_us = NOT_YET if view.discharged_at is None else to_us(view.discharged_at)
    hour = items.hour[live]
    early, late = hour < 0, hour >= MAX_HOURS
    after = ~early & ~late & (items.placed_us[live] > limit_us)
    ignored = dict(view.ignored)
    for reason, which in (
        ("before-admission", early), ("beyond-horizon", late), ("after-discharge", after)
    ):  # fmt: skip
        if n := int(which.sum()):
            ignored[reason] = ignored.get(reason, 0) + n
    used = live[~(early | late | after)]

    observed = np.array([e.kind == "observation" for e in items.entries], dtype=np.bool_)
    observations, events = used[observed[used]], used[~observed[used]]
    head_hour = max(view.head_hour, int(items.hour[used].max(initial=-1)))
    episode = replace(view.episode, n_hours=head_hour + 1)
    episode = with_observations(episode, items.payloads(observations), items.hours[observations])
    happened = items.payloads(events)
    episode, event_units = with_events(episode, view.event_units, happened, items.hours[events])
    n_observations = int(observed[live].sum())
    counts = dict(view.counts)
    counts["observations"] += n_observations
    counts["events"] += len(live) - n_observations
    newest_us = np.maximum(view.newest_us, latest_up_to(items.hour[used], items.effective_us[used]))
    return replace(
        view,
        seq=last.seq,
        recorded_at=last.recorded_at,
        episode=episode,
        event_units=event_units,
        event_pairs=view.event_pairs.union((p["code"], p["unit"]) for p in happened),
        head_hour=head_hour,
        newest_effective_at=None if newest_us[-1] == NEVER else from_us(int(newest_us[-1])),
        counts=counts,
        ignored=ignored,
        newest_us=newest_us,
        known_us=np.minimum(view.known_us, earliest_from(items.hour, items.recorded_us)),
        touched_us=np.maximum(view.touched_us, latest_up_to(items.hour, items.recorded_us)),
    )


def model_episode(view: EpisodeView, vocabulary: EventVocabulary) -> Episode:
    """The episode with its event values in the units of the model that will read it.

    The log keeps what was sent, so that another model, fed in other units, reads the same facts. An
    event whose value does not convert keeps its place and loses its value.
    """
    return in_units_of(vocabulary, view.episode, view.event_units, view.event_pairs)
