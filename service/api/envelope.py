"""What every request and every answer has: an id, headers for browsers, a line in the log."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api.access import ADDRESS, PRINCIPAL, REQUEST_ID
from service.api.metrics import Metrics
from service.tracing import labels_of

_logger = logging.getLogger("service.requests")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(
    rb"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}"
)

# Nothing of ours is to be run, shown in a frame, guessed at or kept by a browser. There are no
# headers for CORS: no page of another origin may read anything.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Envelope:
    """ASGI middleware, the outermost one.

    A request keeps the id that its client or a gateway gave it, if it is a usable one. Its line in
    the log names route and client: no path, no query, no episode.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = _begin(scope)
        scope[REQUEST_ID] = request.request_id
        logs.begin(request)
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                there = {name.lower() for name, _ in headers}
                headers += [header for header in _HEADERS if header[0] not in there]
                headers.append((b"x-request-id", request.request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = labels_of(scope)
        told: dict[str, str | int | float] = {
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 2),
            "principal": scope.get(PRINCIPAL, "-"),
        }
        line = "%(method)s %(route)s %(status)d %(ms).2f ms %(principal)s"
        if status == 401:
            self._metrics.unauthenticated.inc()
            told["address"] = scope.get(ADDRESS) or (scope.get("client") or "-")[0]
            line += " from %(address)s"
        _logger.info(line, told, extra=told)


def _begin(scope: Scope) -> logs.Request:
    headers = dict(scope["headers"])
    given = headers.get(b"x-request-id", b"")
    request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid4().hex
    if (place := _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))) is None:
        return logs.Request(request_id)
    return logs.Request(request_id, place[1].decode(), place[2].decode())
