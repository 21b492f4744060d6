"""How long a read may wait, and for whom: nobody waits for a client that left."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Request

from service.api.problems import LOG_RETRY_AFTER_S, ClientGone, Problem

_WAIT = re.compile(r"""wait\s*=\s*"?(\d{1,9})"?""", re.IGNORECASE)


def preferred_wait(request: Request) -> int | None:
    """Seconds of `Prefer: wait=N` (RFC 7240), of the first one; what is malformed is ignored."""
    for header in request.headers.getlist("prefer"):
        for preference in header.split(","):
            if found := _WAIT.fullmatch(preference.partition(";")[0].strip()):
                return int(found[1])
    return None


def log_retry_after_s() -> int:
    """When to ask again if the log takes too long."""
    return LOG_RETRY_AFTER_S


@asynccontextmanager
async def bounded(
    request: Request, until: float, retry_after_s: Callable[[], int]
) -> AsyncIterator[None]:
    """Give up what is inside at `until` (of the clock of the loop), or when the client is gone.

    Raises Problem `deadline-exceeded`, ClientGone.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.timeout_at(until) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        headers = {"Retry-After": str(retry_after_s())}
        raise Problem("deadline-exceeded", headers=headers) from None
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()
