"""What the resources that answer hour by hour share: selection, provenance, validators."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from service.access.principal import Visit
from service.answers import Selection, WithheldReason, data_age_hours, select_hours, withheld
from service.api.deps import Context
from service.api.problems import Problem, documented
from service.api.schemas import HoursQuery
from service.api.waiting import bounded, log_retry_after_s, preferred_wait
from service.core import (
    BundleInfo,
    EpisodeView,
    HourStatus,
    Overloaded,
    Scores,
    hour_status,
    to_us,
)
from service.times import format_time
from service.timing import measured

_PRIVATE = "private, no-store"

# How often an answer may be overtaken by writes that reach further than its scores.
_MAX_TRIES = 20


RESPONSES: dict[int | str, dict[str, Any]] = {
    304: {"description": "Nothing has changed since the entity tag in If-None-Match"},
    **documented(
        "episode-unknown",
        "model-not-loaded",
        "seq-not-reached",
        "episode-deleted",
        "episode-id-invalid",
        "invalid-request",
        "hour-out-of-range",
        "hour-in-the-future",
        "too-many-requests",
        "model-fault",
        "log-unavailable",
        "log-corrupt",
        "overloaded",
        "deadline-exceeded",
        "engine-unavailable",
    ),
}
"""What every selection of hours may be answered with, besides the hours."""

HEADERS: dict[str, Any] = {
    "parameters": [
        {
            "name": "If-None-Match",
            "in": "header",
            "description": "Entity tags of earlier answers: 304 if one of them is that of now",
            "schema": {"type": "string"},
        },
        {
            "name": "Prefer",
            "in": "header",
            "description": "`wait=N`: wait N seconds for the scores, if that is less than usual",
            "schema": {"type": "string"},
            "example": "wait=2",
        },
    ]
}
"""Headers that are read by hand, as `openapi_extra` of a route."""


@dataclass(frozen=True, slots=True)
class HourPlan:
    """One hour of an answer, before any score."""

    hour: int
    status: HourStatus
    withheld: WithheldReason | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about an answer that does not need the model."""

    view: EpisodeView
    hours: tuple[HourPlan, ...]
    n_hours: int
    """How many hours the model has to score for it."""
    etag: str


async def answer(
    context: Context,
    request: Request,
    visit: Visit,
    episode_id: str,
    query: HoursQuery,
    score_of: Callable[[Scores | None, int], dict[str, Any]],
) -> Response:
    """The selected hours, each with what `score_of` reads off the scores (None: withheld).

    The entity tag is known before the model is asked, so a poll that finds nothing new costs
    nothing. Raises Problem, ClientGone, Overloaded.
    """
    selection = _selection(query)
    resource = request.url.path.rpartition("/")[2]
    wait, preference = _patience(context, request)
    now = asyncio.get_running_loop().time()
    until, latest = now + wait, now + context.settings.read_deadline_seconds
    # Another model may become active meanwhile: this answer is that of one from its begin to end.
    with context.models.serving(query.model_version) as serving:
        bundle = serving.model.engine.bundle
        for _ in range(_MAX_TRIES):
            # A client that takes what is known may have to wait for the log all the same.
            async with bounded(request, latest, log_retry_after_s):
                view = await context.service.view(visit, episode_id, query.as_of, query.min_seq)
            plan = _plan(context, bundle, view, selection, query.as_of, resource)
            headers = {"ETag": plan.etag, "Cache-Control": _PRIVATE, **preference}
            if _matches(request.headers.get("if-none-match"), plan.etag):
                return Response(status_code=304, headers=headers)
            if plan.n_hours == 0:
                scores = None
                break
            with measured("engine"):
                async with bounded(request, until, serving.model.retry_after_s):
                    scored = await context.service.scores(
                        view, plan.n_hours, exact=query.as_of is not None, live=serving.live
                    )
            scores = scored.scores
            if scored.view is not view:
                # Written to meanwhile: answer from the newer entries, if their scores reach.
                plan = _plan(context, bundle, scored.view, selection, query.as_of, resource)
                headers["ETag"] = plan.etag
            if plan.n_hours <= len(scores.hours):
                break
        else:
            raise Overloaded(serving.model.retry_after_s())
    return JSONResponse(_body(plan, scores, bundle, query.as_of, score_of), headers=headers)


def model_provenance(bundle: BundleInfo) -> dict[str, Any]:
    """Which model and preprocessing made an answer."""
    return {
        "model": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "preprocessing_digest": bundle.preprocessing_digest,
        "numerics": asdict(bundle.numerics),
    }


def reason(value: WithheldReason | None) -> dict[str, str] | None:
    return None if value is None else {"reason": value}


def time_or_none(instant: datetime | None) -> str | None:
    return None if instant is None else format_time(instant)


def _patience(context: Context, request: Request) -> tuple[float, dict[str, str]]:
    """Seconds to wait for the engine, and the header that says so if the client chose them."""
    longest = context.settings.read_deadline_seconds
    preferred = preferred_wait(request)
    if preferred is None or preferred > longest:
        return longest, {}
    return preferred, {"Preference-Applied": f"wait={preferred}"}


def _selection(query: HoursQuery) -> Selection:
    if query.hour is not None and (query.from_ is not None or query.to is not None):
        raise Problem("invalid-request", "give `hour`, or `from` and `to`")
    return Selection(hour=query.hour, first=query.from_, last=query.to)


def _plan(
    context: Context,
    bundle: BundleInfo,
    view: EpisodeView,
    selection: Selection,
    as_of: int | datetime | None,
    resource: str,
) -> Plan:
    now = _instant(context, view, as_of)
    settings = context.settings
    hours = tuple(
        HourPlan(
            hour,
            hour_status(view, hour, now, settings.allowed_lateness),
            withheld(view, hour, now, settings.staleness_limit)
            if settings.scoring_enabled
            else "scoring-disabled",
        )
        for hour in select_hours(view, selection, now)
    )
    return Plan(
        view=view,
        hours=hours,
        n_hours=max((h.hour + 1 for h in hours if h.withheld is None), default=0),
        etag=_etag(bundle, view, resource, as_of, hours),
    )


def _instant(context: Context, view: EpisodeView, as_of: int | datetime | None) -> datetime:
    """The present of an answer: what was known then is judged by the clock of then."""
    if as_of is None:
        return context.clock()
    return as_of if isinstance(as_of, datetime) else view.recorded_at


def _etag(
    bundle: BundleInfo,
    view: EpisodeView,
    resource: str,
    as_of: int | datetime | None,
    hours: tuple[HourPlan, ...],
) -> str:
    """Equal tags mean equal bodies: besides log and model it covers what the clock decides."""
    selected = [
        # After a restore the numbers are given again, to other entries.
        to_us(view.recorded_at),
        bundle.digest,
        asdict(bundle.numerics),
        resource,
        str(as_of),
        [[h.hour, h.status, h.withheld] for h in hours],
    ]
    rest = hashlib.sha256(json.dumps(selected).encode()).hexdigest()
    return f'"{view.seq}.{bundle.digest[:8]}.{bundle.preprocessing_digest[:8]}.{rest[:12]}"'


def _matches(if_none_match: str | None, etag: str) -> bool:
    """Weak comparison of RFC 9110: proxies may have weakened our tag."""
    if if_none_match is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags


def _body(
    plan: Plan,
    scores: Scores | None,
    bundle: BundleInfo,
    as_of: int | datetime | None,
    score_of: Callable[[Scores | None, int], dict[str, Any]],
) -> dict[str, Any]:
    view = plan.view
    hours = []
    for h in plan.hours:
        shown = scores if h.withheld is None else None
        hours.append(
            {
                "hour": h.hour,
                "hour_start": format_time(view.hour_start(h.hour)),
                "hour_end": format_time(view.hour_end(h.hour)),
                "status": h.status,
                "imputed_share": None if shown is None else shown.hours[h.hour].imputed_share,
                "data_age_hours": data_age_hours(view, h.hour),
                "score_withheld": reason(h.withheld),
                **score_of(shown, h.hour),
            }
        )
    return {
        "episode_id": view.episode_id,
        "seq": view.seq,
        "score_withheld": reason("no-data" if not hours else None),
        "hours": hours,
        "provenance": {
            **model_provenance(bundle),
            "seq": view.seq,
            "as_of": format_time(as_of) if isinstance(as_of, datetime) else as_of,
            "newest_data_at": time_or_none(view.newest_effective_at),
        },
    }
