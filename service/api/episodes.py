"""/episodes: the stays themselves."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from llm4ehr.episode import Statics
from service.api import examples, problems
from service.api.access import Delete, Ingest, Read
from service.api.body import read_json, validate
from service.api.deps import ContextDep, EpisodeId
from service.api.hours import model_provenance, time_or_none
from service.api.listing import page
from service.api.openapi import example, request_body
from service.api.problems import Problem
from service.api.schemas import (
    AsOfQuery,
    EpisodeListOut,
    EpisodeOut,
    ListQuery,
    PatchEpisode,
    PutEpisode,
)
from service.api.waiting import bounded, log_retry_after_s
from service.core import EpisodeView
from service.decisions import Admission, Change
from service.times import format_time

router = APIRouter(prefix="/episodes", tags=["episodes"])

_WRITE_PROBLEMS = (
    "malformed-json",
    "body-timeout",
    "episode-deleted",
    "body-too-large",
    "unsupported-media-type",
    "invalid-request",
    "episode-id-invalid",
    "too-many-requests",
    "log-busy",
    "log-slow",
    "log-unavailable",
    "log-corrupt",
)


@router.get(
    "",
    operation_id="listEpisodes",
    summary="All stays, the ones at highest risk first",
    response_model=EpisodeListOut,
    responses={
        200: example(examples.EPISODES),
        **problems.documented("invalid-request", "too-many-requests"),
    },
)
async def list_episodes(
    context: ContextDep, visit: Read, query: Annotated[ListQuery, Query()]
) -> Response:
    """One row an episode, with the last computed score of its newest hour and the entry it was
    computed from (`scored_seq`); `risk` is decompensation, or mortality if the model has no such
    task. Episodes without a score to show come last. `complete` is false for a moment after a
    start, while the log is read. Where several replicas share a log, the list may be a moment
    behind what another one wrote; `complete` is false while it is known to be further behind.
    """
    shown = page(
        context.service.live.summaries,
        query,
        visit.principal,
        now=context.clock(),
        settings=context.settings,
    )
    visit.episodes = tuple(row["episode_id"] for row in shown["episodes"])
    return JSONResponse(
        shown
        | {
            "complete": context.complete,
            "provenance": model_provenance(context.engine.bundle),
        },
        headers={"Cache-Control": "private, no-store"},
    )


@router.get(
    "/{episode_id}",
    operation_id="getEpisode",
    summary="Admission, discharge and what is on record",
    response_model=EpisodeOut,
    responses={
        200: example(examples.EPISODE),
        **problems.documented(
            "episode-unknown",
            "seq-not-reached",
            "episode-deleted",
            "episode-id-invalid",
            "invalid-request",
            "too-many-requests",
            "log-unavailable",
            "log-corrupt",
            "deadline-exceeded",
        ),
    },
)
async def get_episode(
    request: Request,
    context: ContextDep,
    visit: Read,
    episode_id: EpisodeId,
    query: Annotated[AsOfQuery, Query()],
) -> Response:
    """`ignored` counts the live items that the model does not see, by reason."""
    until = asyncio.get_running_loop().time() + context.settings.read_deadline_seconds
    async with bounded(request, until, log_retry_after_s):
        view = await context.service.view(visit, episode_id, query.as_of, query.min_seq)
    return _represented(view)


@router.put(
    "/{episode_id}",
    operation_id="putEpisode",
    summary="Create a stay, or replace its admission",
    response_model=EpisodeOut,
    openapi_extra=request_body(PutEpisode, {"admission": examples.PUT_REQUEST}),
    responses={
        200: {"description": "The admission is as sent", **example(examples.EPISODE)},
        201: {"description": "The episode was created", "model": EpisodeOut},
        **problems.documented(*_WRITE_PROBLEMS, "admission-missing"),
    },
)
async def put_episode(
    request: Request, context: ContextDep, visit: Ingest, episode_id: EpisodeId
) -> Response:
    """Sending the same again changes nothing. Static facts that are left out become unknown."""
    raw = await read_json(request, context.settings)
    if isinstance(raw, dict) and raw.get("admitted_at") is None:
        raise Problem("admission-missing", "`admitted_at` is required")
    body = validate(PutEpisode, raw)
    view, created = await context.service.put(
        visit,
        episode_id,
        Admission(admitted_at=body.admitted_at, statics=Statics(**body.statics.model_dump())),
    )
    response = _represented(view)
    if created:
        response.status_code = 201
        response.headers["Location"] = f"/episodes/{episode_id}"
    return response


@router.patch(
    "/{episode_id}",
    operation_id="patchEpisode",
    summary="Discharge a stay, move its admission, complete its static facts",
    response_model=EpisodeOut,
    openapi_extra=request_body(
        PatchEpisode,
        {"discharge": examples.PATCH_DISCHARGE, "late admission": examples.PATCH_ADMISSION},
    ),
    responses={
        200: example(examples.EPISODE | {"discharged_at": "2026-03-04T11:30:00Z", "seq": 5}),
        **problems.documented("episode-unknown", *_WRITE_PROBLEMS),
    },
)
async def patch_episode(
    request: Request, context: ContextDep, visit: Ingest, episode_id: EpisodeId
) -> Response:
    """Moving the admission moves the hour every item falls into. Items that come to lie before the
    admission or after the discharge are kept, but the model does not see them.
    """
    raw = await read_json(request, context.settings)
    body = validate(PatchEpisode, raw)
    view = await context.service.patch(
        visit,
        episode_id,
        Change(
            admitted_at=body.admitted_at,
            statics=body.statics.model_dump(exclude_unset=True),
            discharge="discharged_at" in body.model_fields_set,
            discharged_at=body.discharged_at,
        ),
    )
    return _represented(view)


@router.delete(
    "/{episode_id}",
    operation_id="deleteEpisode",
    summary="Delete a stay",
    status_code=204,
    responses=problems.documented(
        "episode-unknown",
        "episode-id-invalid",
        "too-many-requests",
        "log-busy",
        "log-slow",
        "log-unavailable",
        "log-corrupt",
    ),
)
async def delete_episode(context: ContextDep, visit: Delete, episode_id: EpisodeId) -> Response:
    """The stay no longer answers and its id stays taken. What was recorded remains in the log, and
    `as_of` a time before the deletion still shows what was known then.
    """
    await context.service.delete(visit, episode_id)
    return Response(status_code=204)


def _represented(view: EpisodeView) -> Response:
    statics = view.statics
    body: dict[str, Any] = {
        "episode_id": view.episode_id,
        "seq": view.seq,
        "admitted_at": format_time(view.admitted_at),
        "discharged_at": time_or_none(view.discharged_at),
        "updated_at": format_time(view.recorded_at),
        "statics": {
            name: value
            for name in statics.__dataclass_fields__
            if (value := getattr(statics, name)) is not None
        },
        "head_hour": view.head_hour if view.head_hour >= 0 else None,
        "newest_data_at": time_or_none(view.newest_effective_at),
        "counts": dict(view.counts),
        "ignored": dict(view.ignored),
    }
    return JSONResponse(body, headers={"Cache-Control": "private, no-store"})
