"""A service that is open to everybody says so: in its log, and in every answer."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_logger = logging.getLogger(__name__)

HEADER = (b"x-llm4ehr-mode", b"open-demo")

_AGAIN_S = 60.0


class OpenDemo:
    """ASGI middleware: puts the header on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def declare(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), HEADER]}
            await send(message)

        await self._app(scope, receive, declare)


async def warn(every_s: float = _AGAIN_S) -> None:
    """A line in the log now and every minute, until it is cancelled."""
    while True:
        _logger.warning("OPEN: everybody may read and change everything; for demonstrations alone")
        await asyncio.sleep(every_s)
