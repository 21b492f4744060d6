"""POST /episodes/{id}/observations: everything that is measured, given or taken back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from llm4ehr.episode import Statics
from service.api import examples, problems
from service.api.access import Ingest
from service.api.body import read_json, validate
from service.api.deps import ContextDep, EpisodeId
from service.api.openapi import example, request_body
from service.api.problems import Problem
from service.api.schemas import ItemResultOut, PostedOut, PostItems, PostItemsDescribed
from service.decisions import Admission, NothingAccepted
from service.ingest import Batch

router = APIRouter(tags=["episodes"])


@router.post(
    "/episodes/{episode_id}/observations",
    operation_id="postObservations",
    summary="Record observations, events, corrections and withdrawals",
    response_model=PostedOut,
    openapi_extra=request_body(
        PostItemsDescribed,
        {"first data of a stay": examples.POST_REQUEST, "correction": examples.POST_CORRECTION},
    ),
    responses={
        200: example(examples.POST_ANSWER),
        **problems.documented(
            "malformed-json",
            "body-timeout",
            "episode-unknown",
            "episode-deleted",
            "body-too-large",
            "too-many-items",
            "unsupported-media-type",
            "invalid-request",
            "episode-id-invalid",
            "all-items-rejected",
            "too-many-requests",
            "log-busy",
            "log-slow",
            "log-unavailable",
            "log-corrupt",
        ),
    },
)
async def post_observations(
    request: Request, context: ContextDep, visit: Ingest, episode_id: EpisodeId
) -> Response:
    """Each item is judged alone: good ones are durable once this returns, bad ones are refused with
    a reason. Sending an item again, by the same id or with the same content, changes nothing.

    With `admitted_at` an unknown episode is created; the admission of a known one never moves here.
    """
    body = validate(PostItems, await read_json(request, context.settings))
    if len(body.observations) + len(body.events) + len(body.withdrawals) > (
        limit := context.settings.max_items
    ):
        raise Problem("too-many-items", f"at most {limit} items are accepted")
    if body.admitted_at is None and "statics" in body.model_fields_set:
        raise Problem("invalid-request", "static facts come with `admitted_at`, or by PATCH")
    admission = None
    if body.admitted_at is not None:
        statics = Statics(**body.statics.model_dump())
        admission = Admission(admitted_at=body.admitted_at, statics=statics)
    batch = Batch(observations=body.observations, events=body.events, withdrawals=body.withdrawals)
    try:
        seq, posted = await context.service.post(visit, episode_id, batch, admission)
    except NothingAccepted as nothing:
        for result in nothing.results:
            context.metrics.count(result)
        raise
    for result in posted.results:
        context.metrics.count(result)
    statuses = [result.status for result in posted.results]
    answer: dict[str, Any] = {
        "episode_id": episode_id,
        "seq": seq,
        "admission": posted.admission,
        "accepted": statuses.count("accepted"),
        "duplicates": statuses.count("duplicate"),
        "rejected": statuses.count("rejected"),
        "items": [
            ItemResultOut.of(result, known)
            for result, known in zip(posted.results, posted.targets_known, strict=True)
        ],
    }
    return JSONResponse(answer)
