"""Too many requests of one client at a time."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.metrics import Metrics
from service.api.problems import Problem

_RETRY_AFTER_S = 1


class LimitClients:
    """ASGI middleware: at most `limit` requests of one peer address are answered at a time.

    Health, metrics and the operator's summary are always answered. Behind a gateway every request
    comes from one address, so this is for services that clients reach directly.
    """

    def __init__(self, app: ASGIApp, *, limit: int, metrics: Metrics) -> None:
        self._app = app
        self._limit = limit
        self._metrics = metrics
        self._in_flight: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/episodes"):
            await self._app(scope, receive, send)
            return
        client = scope["client"][0] if scope.get("client") else ""
        n = self._in_flight.get(client, 0)
        if n >= self._limit:
            self._metrics.refused("too-many-requests")
            problem = Problem(
                "too-many-requests",
                f"at most {self._limit} requests of one client are answered at a time",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
            await problem.response(scope["path"])(scope, receive, send)
            return
        self._in_flight[client] = n + 1
        try:
            await self._app(scope, receive, send)
        finally:
            if self._in_flight[client] == 1:
                del self._in_flight[client]
            else:
                self._in_flight[client] -= 1
