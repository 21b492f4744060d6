"""GET /episodes/{id}/embeddings: the hidden state of the model after each hour."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.api import examples
from service.api.access import Read
from service.api.deps import ContextDep, EpisodeId
from service.api.hours import HEADERS, RESPONSES, answer
from service.api.openapi import example
from service.api.schemas import EmbeddingsOut, HoursQuery
from service.core import Scores

router = APIRouter(tags=["scores"])


@router.get(
    "/episodes/{episode_id}/embeddings",
    operation_id="getEmbeddings",
    summary="Embedding of the latest hour, of one hour, or of a range",
    response_model=EmbeddingsOut,
    responses={
        200: example(examples.EMBEDDINGS),
        **RESPONSES,
    },
    openapi_extra=HEADERS,
)
async def get_embeddings(
    request: Request,
    context: ContextDep,
    visit: Read,
    episode_id: EpisodeId,
    query: Annotated[HoursQuery, Query()],
) -> Response:
    """The state of the stay at the end of each hour, as the model's heads read it. Hours are
    selected, and withheld, as for the risk.
    """
    return await answer(context, request, visit, episode_id, query, _embedding)


def _embedding(scores: Scores | None, hour: int) -> dict[str, Any]:
    return {"embedding": None if scores is None else scores.embeddings[hour].tolist()}
