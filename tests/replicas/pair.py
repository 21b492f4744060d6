"""Two replicas on one log in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.replicas.shared_log import SharedLog, Store
from tests.service.fakes import Client, Clock, FakeEngine, at, running

NOW = at(8.5)

# Far more than anything takes: ends only what hangs.
_PATIENCE_S = 60


class Pair:
    """Clients of two replicas, `a` and `b`, and the store behind them."""

    def __init__(self, store: Store, clients: list[Client], logs: list[SharedLog]) -> None:
        self.store = store
        self.clients = clients
        self.logs = logs
        self.a, self.b = clients

    async def agree(self, episode: str) -> tuple[httpx.Response, httpx.Response]:
        """What both say of a stay, after what they must have in common was compared."""
        whole = [await c.http.get(f"/episodes/{episode}") for c in self.clients]
        assert {r.status_code for r in whole} <= {200, 404, 410}, [r.text for r in whole]
        if whole[0].status_code == 200:
            assert whole[0].json() == whole[1].json()
        else:
            assert whole[0].status_code == whole[1].status_code
        scores = [await c.risk(episode, **{"from": 0, "to": 7}) for c in self.clients]
        if scores[0].status_code == 200:
            assert scores[0].json() == scores[1].json()
            assert scores[0].headers["etag"] == scores[1].headers["etag"]
        return scores[0], scores[1]

    async def lists(self) -> list[dict[str, Any]]:
        """The list of each, once nothing is on its way any more."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                said = [(await c.http.get("/episodes")).json() for c in self.clients]
                if all(one["complete"] and self._is_up(one["episodes"]) for one in said):
                    return said
                await asyncio.sleep(0.005)

    def _is_up(self, rows: list[dict[str, Any]]) -> bool:
        """Whether a list has all that the store has, scored."""
        held = {
            name: len(entries)
            for name, entries in self.store.entries.items()
            if entries[-1].kind != "deletion" and name not in self.store.corrupt
        }
        scored = all(row["scored_seq"] == row["seq"] for row in rows if row["hour"] is not None)
        return scored and held.items() <= {row["episode_id"]: row["seq"] for row in rows}.items()


@asynccontextmanager
async def pair(
    folder: Path, seed: int = 0, *, store: Store | None = None, **settings: Any
) -> AsyncIterator[Pair]:
    """The clock of `b` runs two seconds behind."""
    store, logs, clients = store or Store(), [], []
    async with AsyncExitStack() as stack:
        # No pause for further news: the tests have none to wait for.
        stack.enter_context(pytest.MonkeyPatch.context()).setattr("service.follow._DEBOUNCE_S", 0)
        for i in range(2):
            logs.append(SharedLog(store, Random(seed + i)))
            client = await stack.enter_async_context(
                running(
                    folder / "unused.sqlite",
                    engine=FakeEngine(),
                    clock=Clock(NOW - timedelta(seconds=2 * i)),
                    log=logs[i],
                    **settings,
                )
            )
            clients.append(client)
        yield Pair(store, clients, logs)
