"""Filter, order and pages of the list of episodes. Pure functions over summaries."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service.access.principal import Principal
from service.answers import WithheldReason, is_stale
from service.api.hours import reason, time_or_none
from service.api.problems import Problem
from service.api.schemas import ListQuery
from service.core import to_us
from service.settings import Settings
from service.state import Summary
from service.times import format_time

_Key = tuple[float | str, str]


@dataclass(frozen=True, slots=True)
class _Row:
    summary: Summary
    withheld: WithheldReason | None
    risk: float | None


def page(
    summaries: Iterable[Summary],
    query: ListQuery,
    principal: Principal,
    *,
    now: datetime,
    settings: Settings,
) -> dict[str, Any]:
    """One page of the rows that a client may see, and the cursor of the next.

    A cursor holds the place in the order, not a count: rows that come, go or move between two pages
    do not shift the others.
    """
    descending = (query.order or ("asc" if query.sort == "episode_id" else "desc")) == "desc"
    rows = [
        _row(s, now, settings)
        for s in summaries
        if principal.may_list(s.episode_id, s.unit_type) and _kept(s, query.status)
    ]
    if query.min_risk is not None:
        rows = [r for r in rows if r.risk is not None and r.risk >= query.min_risk]
    keyed = [(_value(row, query.sort), row) for row in rows]
    ordered: list[tuple[_Key, _Row]] = sorted(
        (((value, row.summary.episode_id), row) for value, row in keyed if value is not None),
        key=lambda pair: pair[0],
        reverse=descending,
    )
    # Rows without a score come last either way.
    unscored = sorted(
        (row for value, row in keyed if value is None), key=lambda row: row.summary.episode_id
    )
    if query.cursor is not None:
        value, episode_id = _decode(query.cursor, query.sort, descending)
        if value is None:
            ordered = []
            unscored = [r for r in unscored if r.summary.episode_id > episode_id]
        else:
            after = (value, episode_id)
            ordered = [
                (key, row) for key, row in ordered if (key < after if descending else key > after)
            ]
    rows = [row for _, row in ordered] + unscored
    shown = rows[: query.limit]
    return {
        "episodes": [_rendered(row, now) for row in shown],
        "next_cursor": _encode(shown[-1], query.sort, descending)
        if len(rows) > len(shown)
        else None,
    }


def _kept(summary: Summary, status: str | None) -> bool:
    return status is None or (status == "discharged") == (summary.discharged_at is not None)


def _row(summary: Summary, now: datetime, settings: Settings) -> _Row:
    withheld: WithheldReason | None = None
    newest = summary.newest_effective_at
    if not settings.scoring_enabled:
        withheld = "scoring-disabled"
    elif newest is None:
        withheld = "no-data"
    elif is_stale(newest, summary.discharged_at, now, settings.staleness_limit):
        withheld = "stale-data"
    elif summary.latest is None:
        withheld = "not-computed"
    latest = summary.latest
    if withheld is not None or latest is None:
        return _Row(summary, withheld, None)
    risk = latest.mortality if latest.decompensation is None else latest.decompensation
    return _Row(summary, None, risk)


def _value(row: _Row, sort: str) -> float | str | None:
    summary = row.summary
    match sort:
        case "risk":
            return row.risk
        case "admitted_at":
            return to_us(summary.admitted_at)
        case "updated_at":
            return to_us(summary.updated_at)
        case _:
            return summary.episode_id


def _rendered(row: _Row, now: datetime) -> dict[str, Any]:
    summary = row.summary
    latest = summary.latest if row.withheld is None else None
    has_data = summary.head_hour >= 0
    return {
        "episode_id": summary.episode_id,
        "seq": summary.seq,
        "admitted_at": format_time(summary.admitted_at),
        "discharged_at": time_or_none(summary.discharged_at),
        "updated_at": format_time(summary.updated_at),
        "newest_data_at": time_or_none(summary.newest_effective_at),
        "hour": summary.head_hour if has_data else None,
        "status": summary.status(now) if has_data else None,
        "risk": row.risk,
        "decompensation": None if latest is None else latest.decompensation,
        "mortality": None if latest is None else latest.mortality,
        "remaining_los_hours": None if latest is None else latest.remaining_los_hours,
        "scored_seq": None if latest is None else summary.scored_seq,
        "score_withheld": reason(row.withheld),
    }


def _encode(row: _Row, sort: str, descending: bool) -> str:
    place = [sort, descending, _value(row, sort), row.summary.episode_id]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _decode(cursor: str, sort: str, descending: bool) -> tuple[float | str | None, str]:
    """The place a cursor stands for. Raises Problem unless it was made for the same order."""
    try:
        place = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        made_for, made_descending, value, episode_id = place
        kinds = str if sort == "episode_id" else (int, float, type(None))
        if (made_for, made_descending) == (sort, descending) and isinstance(value, kinds):
            return value, str(episode_id)
    except (binascii.Error, ValueError, TypeError):
        pass
    raise Problem("invalid-request", "the cursor belongs to no list, or to one in another order")
