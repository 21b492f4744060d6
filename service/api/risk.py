"""GET /episodes/{id}/risk: what the model says, hour by hour."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.api import examples
from service.api.access import Read
from service.api.deps import ContextDep, EpisodeId
from service.api.hours import HEADERS, RESPONSES, answer
from service.api.openapi import example
from service.api.schemas import HoursQuery, RiskOut
from service.core import Scores

router = APIRouter(tags=["scores"])


@router.get(
    "/episodes/{episode_id}/risk",
    operation_id="getRisk",
    summary="Risk of the latest hour, of one hour, or of a range",
    response_model=RiskOut,
    responses={
        200: example(examples.RISK),
        **RESPONSES,
    },
    openapi_extra=HEADERS,
)
async def get_risk(
    request: Request,
    context: ContextDep,
    visit: Read,
    episode_id: EpisodeId,
    query: Annotated[HoursQuery, Query()],
) -> Response:
    """The probability of decompensation in the next 24 hours and of death in hospital, the
    remaining length of stay in hours, with an interval where the model has one, and the probability
    of each phenotype, with their provenance.

    The answer includes everything that was acknowledged before. A score that the data does not
    support is null, and `score_withheld` says why.
    """
    return await answer(context, request, visit, episode_id, query, _risk)


def _risk(scores: Scores | None, hour: int) -> dict[str, Any]:
    if scores is None:
        return {
            "decompensation": None,
            "mortality": None,
            "remaining_los_hours": None,
            "remaining_los_interval_hours": None,
            "phenotypes": {},
        }
    score = scores.hours[hour]
    interval = score.remaining_los_interval_hours
    return {
        "decompensation": score.decompensation,
        "mortality": score.mortality,
        "remaining_los_hours": score.remaining_los_hours,
        "remaining_los_interval_hours": None if interval is None else asdict(interval),
        "phenotypes": score.phenotypes,
    }
