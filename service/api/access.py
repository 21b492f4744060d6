"""What a route requires of who calls it. Every route but health declares it here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import uuid4

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from service.access.authenticator import Credentials, Unauthenticated
from service.access.principal import Principal, Scope, Visit
from service.api.deps import EPISODE_ID, Context, ContextDep

VISIT = "llm4ehr.visit"
"""Where in the scope of a request its visit stands, once the client was recognised."""

REQUEST_ID = "llm4ehr.request_id"

ADDRESS = "llm4ehr.address"
"""Where in the scope it stands from where the request came, as far as that is believed."""


class Requires:
    """A dependency: the client is recognised, within its limits, and has one of the scopes.

    It runs before parameters are judged and before a body is read.
    """

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes
        # Who looks after the service is answered also while it has much to do.
        self._is_held = not {Scope.ADMIN, Scope.METRICS}.intersection(scopes)

    async def __call__(self, request: Request, context: ContextDep) -> AsyncIterator[Visit]:
        """The visit, with its place among the requests of its client until the answer is sent.

        Raises Unauthenticated, IssuerUnavailable, Forbidden, Problem.
        """
        principal, address = await _recognise(request, context)
        context.limits.count(principal, address)
        episode_id = request.path_params.get("episode_id", "")
        visit = Visit(
            principal=principal,
            operation=request.scope["route"].operation_id or request.scope["route"].path,
            request_id=request.scope.get(REQUEST_ID) or uuid4().hex,
            address=address,
            # What is no id is refused in a moment, and could be anything.
            episodes=(episode_id,) if re.fullmatch(EPISODE_ID, episode_id) else (),
        )
        request.scope[VISIT] = visit
        principal.require(self.scopes)
        if not self._is_held:
            yield visit
            return
        with context.limits.holding(principal, address):
            yield visit


Ingest = Annotated[Visit, Depends(Requires(Scope.INGEST))]
Delete = Annotated[Visit, Depends(Requires(Scope.DELETE))]
Read = Annotated[Visit, Depends(Requires(Scope.READ))]
Admin = Annotated[Visit, Depends(Requires(Scope.ADMIN))]
ReadOrAdmin = Annotated[Visit, Depends(Requires(Scope.READ, Scope.ADMIN))]
Operate = Annotated[Visit, Depends(Requires(Scope.METRICS, Scope.ADMIN))]
AnyClient = Annotated[Visit, Depends(Requires(*Scope))]


def required_of(route: APIRoute) -> tuple[Scope, ...]:
    """The scopes of which a route requires one; none where it requires nothing."""
    calls = (dependency.call for dependency in route.dependant.dependencies)
    return next((call.scopes for call in calls if isinstance(call, Requires)), ())


async def _recognise(request: Request, context: Context) -> tuple[Principal, str]:
    """Who sends a request, and from where."""
    credentials = Credentials(
        authorization=_only(request, "authorization"),
        subject=_only(request, "x-client-subject"),
        gateway_secret=_only(request, "x-gateway-secret"),
        peer=request.client.host if request.client is not None else "",
        forwarded_for=",".join(request.headers.getlist("x-forwarded-for")) or None,
    )
    address = request.scope[ADDRESS] = context.authenticator.address(credentials)
    sent = (credentials.authorization, credentials.subject, credentials.gateway_secret)
    name = hashlib.sha256(repr(sent).encode()).digest()
    context.limits.may_try(address, name)
    try:
        principal = await context.authenticator.recognise(credentials)
    except Unauthenticated:
        context.limits.failed(address, name)
        raise
    context.limits.succeeded(name)
    return principal, address


def _only(request: Request, name: str) -> str | None:
    """The header of that name. Of two a gateway may have judged the one and we the other."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise Unauthenticated("a header that says who you are is there twice")
    return values[0] if values else None
