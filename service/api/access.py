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
from service.api.problems import MAX_ERRORS, too_wide

VISIT = "llm4ehr.visit"
"""Where in the scope of a request its visit stands, once the client was recognised."""

PRINCIPAL = "llm4ehr.principal"
"""Where in the scope the name of the client stands, also if it is refused for its many requests."""

REQUEST_ID = "llm4ehr.request_id"

ADDRESS = "llm4ehr.address"
"""Where in the scope it stands from where the request came, as far as that is believed."""


_IDENTITY = ("authorization", "x-client-subject", "x-gateway-secret")


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
        request.scope[PRINCIPAL] = principal.id
        context.limits.count(principal, address)
        if request.scope["query_string"].count(b"&") >= MAX_ERRORS:
            raise too_wide("/query")
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
    sent = {name: request.headers.getlist(name) for name in _IDENTITY}
    authorization, subject, secret = map(_only, sent.values())
    credentials = Credentials(
        authorization=authorization,
        subject=subject,
        gateway_secret=secret,
        peer=request.client.host if request.client is not None else "",
        forwarded_for=",".join(request.headers.getlist("x-forwarded-for")) or None,
    )
    address = request.scope[ADDRESS] = context.authenticator.address(credentials)
    name = hashlib.sha256(repr(sent).encode()).digest()
    context.limits.may_try(address, name)
    try:
        # Of two a gateway may have judged the one and we the other.
        if any(len(values) > 1 for values in sent.values()):
            raise Unauthenticated("a header that says who you are is there twice")
        principal = await context.authenticator.recognise(credentials)
    except Unauthenticated:
        context.limits.failed(address, name)
        raise
    context.limits.succeeded(name)
    return principal, address


def _only(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else None
