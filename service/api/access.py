"""What a route requires of who calls it. Every route but health declares it here."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

from fastapi import Depends, Request

from service.access.authenticator import Credentials
from service.access.principal import Scope, Visit
from service.api.deps import ContextDep

VISIT = "llm4ehr.visit"
"""Where in the scope of a request its visit stands, once the client was recognised."""

REQUEST_ID = "llm4ehr.request_id"


class Requires:
    """A dependency: the client is recognised and has one of the scopes."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes

    async def __call__(self, request: Request, context: ContextDep) -> Visit:
        """Raises Unauthenticated, Forbidden."""
        headers = request.headers
        recognised = await context.authenticator.recognise(
            Credentials(
                authorization=headers.get("authorization"),
                subject=headers.get("x-client-subject"),
                gateway_secret=headers.get("x-gateway-secret"),
                peer=request.client.host if request.client is not None else "",
                forwarded_for=headers.get("x-forwarded-for"),
            )
        )
        episode_id = request.path_params.get("episode_id")
        visit = Visit(
            principal=recognised.principal,
            operation=request.scope["route"].operation_id or request.scope["route"].path,
            request_id=request.scope.get(REQUEST_ID) or uuid4().hex,
            address=recognised.address,
            episodes=() if episode_id is None else (episode_id,),
        )
        request.scope[VISIT] = visit
        recognised.principal.require(self.scopes)
        return visit


Ingest = Annotated[Visit, Depends(Requires(Scope.INGEST))]
Read = Annotated[Visit, Depends(Requires(Scope.READ))]
Admin = Annotated[Visit, Depends(Requires(Scope.ADMIN))]
ReadOrAdmin = Annotated[Visit, Depends(Requires(Scope.READ, Scope.ADMIN))]
Operate = Annotated[Visit, Depends(Requires(Scope.METRICS, Scope.ADMIN))]
AnyClient = Annotated[Visit, Depends(Requires(*Scope))]
