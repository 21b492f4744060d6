"""Too many requests of one client at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request

from service.api.problems import Problem

_RETRY_AFTER_S = 1


class LimitClients:
    """A dependency: at most `limit` requests of one peer address are answered at a time.

    For the routes below /episodes; the others are always answered. Behind a gateway every request
    comes from one address, so this is for services that clients reach directly.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight: dict[str, int] = {}

    async def __call__(self, request: Request) -> AsyncIterator[None]:
        """Holds a place until the answer is sent. Raises Problem."""
        client = request.client.host if request.client is not None else ""
        n = self._in_flight.get(client, 0)
        if n >= self._limit:
            raise Problem(
                "too-many-requests",
                f"at most {self._limit} requests of one client are answered at a time",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        self._in_flight[client] = n + 1
        try:
            yield
        finally:
            if self._in_flight[client] == 1:
                del self._in_flight[client]
            else:
                self._in_flight[client] -= 1
