"""Which hours an answer is about, and whether their scores may be shown. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from llm4ehr.episode import MAX_HOURS
from service.core import EpisodeView

WithheldReason = Literal["no-data", "stale-data", "scoring-disabled", "not-computed"]
HourProblem = Literal["hour-out-of-range", "hour-in-the-future"]

_HOUR = timedelta(hours=1)


class HourError(ValueError):
    """The episode has no such hour, or not yet."""

    def __init__(self, problem: HourProblem, detail: str) -> None:
        super().__init__(detail)
        self.problem: HourProblem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a reader asked for: one hour, a range with both ends, or (all None) the latest hour."""

    hour: int | None = None
    first: int | None = None
    last: int | None = None


def select_hours(view: EpisodeView, selection: Selection, now: datetime) -> range:
    """The selected hours; empty if the episode has no data and no hour was asked for.

    The latest hour is the last one with data. Hours after it may be asked for up to the one that is
    running: they are hours without data, which the model sees as such. Raises HourError.
    """
    if selection == Selection():
        return range(max(view.head_hour, 0), view.head_hour + 1)
    if selection.hour is not None:
        first = last = selection.hour
    else:
        first = 0 if selection.first is None else selection.first
        last = view.head_hour if selection.last is None else selection.last
    if not (0 <= first < MAX_HOURS and last < MAX_HOURS):
        raise HourError("hour-out-of-range", f"hours are 0 to {MAX_HOURS - 1}")
    if selection.last is not None and last < first:
        raise HourError("hour-out-of-range", "the range ends before it begins")
    if max(first, last) > max(view.head_hour, view.hour_at(now)):
        raise HourError("hour-in-the-future", "the hour has not begun")
    if view.discharged_at is not None and last > max(
        view.head_hour, view.hour_at(view.discharged_at)
    ):
        raise HourError("hour-out-of-range", "the stay ended before that hour")
    return range(first, last + 1)


def withheld(
    view: EpisodeView, hour: int, now: datetime, staleness_limit: timedelta | None
) -> WithheldReason | None:
    """Why the score of an hour is not shown; None if it is.

    An hour before the newest data is judged at its own end. The last hour with data and those after
    it are what a reader takes for the present: they are judged now, or at discharge.
    """
    newest = view.newest_data_at(hour)
    if newest is None:
        return "no-data"
    if hour >= view.head_hour:
        stale = is_stale(newest, view.discharged_at, now, staleness_limit)
    else:
        stale = is_stale(newest, None, view.hour_end(hour), staleness_limit)
    return "stale-data" if stale else None


def is_stale(
    newest: datetime, discharged_at: datetime | None, now: datetime, limit: timedelta | None
) -> bool:
    """Whether the newest data is too old to speak for the present, or for the end of the stay."""
    at = now if discharged_at is None else min(now, discharged_at)
    return limit is not None and at - newest > limit


def data_age_hours(view: EpisodeView, hour: int) -> float | None:
    """Age of the newest data at the end of an hour; None without data. It never changes later
    unless the data does.
    """
    newest = view.newest_data_at(hour)
    return None if newest is None else (view.hour_end(hour) - newest) / _HOUR
