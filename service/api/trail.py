"""Who read what: the line of the audit trail of every request that wrote none of its own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import timing
from service.access.principal import Visit
from service.api.access import VISIT
from service.core import to_us
from service.trail.keeper import Trail
from service.trail.record import Action, Outcome, record_of

# Nothing of a patient, nothing that changes anything, and asked for every few seconds by machines.
# Whoever is refused them is in the trail all the same.
UNRECORDED = frozenset(
    {
        "/metrics",
        "getServer",
        "getModel",
        "getModelVersion",
        "getModelReady",
        "getModelVersionReady",
        "getOperatorSummary",
    }
)
"""Operations whose success is not in the audit trail."""

_ACTIONS: dict[str, Action] = {
    "GET": "read",
    "POST": "create",
    "PUT": "update",
    "PATCH": "update",
    "DELETE": "delete",
}


class AuditTrail:
    """ASGI middleware: writes the line before the first byte of the answer leaves.

    A request has one once its client was recognised, unless it is refused for too many of them,
    which could fill the trail. What was written to the log of an episode has
    its line there already, in one transaction.
    """

    def __init__(self, app: ASGIApp, trail: Trail, clock: Callable[[], datetime]) -> None:
        self._app = app
        self._trail = trail
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def watch(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                await self._tell(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if not answered:
                await self._tell(scope, 500)
            raise

    async def _tell(self, scope: Scope, status: int) -> None:
        visit: Visit | None = scope.get(VISIT)
        if visit is None or visit.recorded or status == 429:
            return
        if visit.operation in UNRECORDED and status != 403:
            return
        record = record_of(visit, _action(scope), _outcome(status), to_us(self._clock()))
        with timing.measured("audit"):
            await self._trail.write(record)


def _action(scope: Scope) -> Action:
    method = scope["method"]
    if method != "GET" and scope["route"].path.startswith("/models"):
        return "execute"
    return _ACTIONS.get(method, "execute")


def _outcome(status: int) -> Outcome:
    if status < 400:
        return "success"
    return "refused" if status < 500 else "failed"
