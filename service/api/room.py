"""A connection for which there is no room is told so, and ended."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.problems import Problem

EXTRA = "llm4ehr.extra"
"""Is in the scope of a request whose connection is one more than there may be."""

_HEALTH = "/v2/health/"


class Room:
    """ASGI middleware: connections that were there before go on, and health is always answered."""

    def __init__(self, app: ASGIApp, refused: Callable[[str], None]) -> None:
        """`refused` hears the name of every problem by which the service keeps load off."""
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if EXTRA not in scope or scope["path"].startswith(_HEALTH):
            await self._app(scope, receive, send)
            return
        problem = Problem(
            "too-many-connections", headers={"Retry-After": "1", "Connection": "close"}
        )
        self._refused(problem.name)
        await problem.response(scope["path"])(scope, receive, send)
