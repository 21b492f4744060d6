"""Whole stays through the service: hour by hour, as JSON over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from llm4ehr.bundle import Bundle
from llm4ehr.episode import Episode
from service.access.authenticator import Anyone
from service.access.principal import Principal, Scope, Visit
from service.api import Dependencies, create_app
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.log import SqliteLog
from service.replay import admission, hourly_bodies
from service.settings import Settings
from tests.online import engine_of, model_of

VISIT = Visit(
    principal=Principal(id="anyone", method="open", scopes=frozenset(Scope)),
    operation="test",
    request_id="test",
    address="127.0.0.1",
)
"""Of somebody who may see everything."""


@asynccontextmanager
async def service_of(
    bundle: Bundle, backend: TorchCpuBackend, log: SqliteLog
) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    """The app on that backend and log: a client of it, and its service object."""
    engine = engine_of(bundle, backend=backend)
    app = create_app(
        Settings(staleness_limit_hours=None),
        Dependencies(log=log, authenticator=Anyone(), model=model_of(bundle, engine)),
    )
    transport = httpx.ASGITransport(app=app)
    engine.start()
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            yield http, app.state.context.service
    finally:
        engine.close()


async def stream(
    http: httpx.AsyncClient, stays: Mapping[str, Episode], units: Mapping[str, str | None]
) -> None:
    """Admit every stay and post its items, one hour of all stays after the other.

    Every item must be accepted. Those of the very last minute, in an hour that has not come yet,
    are left out.
    """
    admitted_at = datetime.now(UTC) - timedelta(hours=12 + max(s.n_hours for s in stays.values()))
    queues = {}
    for name, stay in stays.items():
        body = admission(stay, admitted_at)
        assert (await http.put(f"/episodes/{name}", json=body)).status_code == 201
        queues[name] = dict(hourly_bodies(stay, admitted_at, dict(units)))

    async def post(name: str, hour: int) -> None:
        body = queues[name].get(hour)
        if body is not None and hour < stays[name].n_hours:
            answer = (await http.post(f"/episodes/{name}/observations", json=body)).json()
            errors = [item["error"] for item in answer["items"] if "error" in item]
            assert answer["accepted"] == sum(map(len, body.values())), errors

    for hour in range(max(stay.n_hours for stay in stays.values())):
        await asyncio.gather(*(post(name, hour) for name in stays))


def sorted_items(episode: Episode) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Observations and events as tuples of numbers, exactly; NaN by its name."""
    observations = zip(
        episode.obs_variable.tolist(),
        episode.obs_hours.tolist(),
        episode.obs_value.tolist(),
        episode.obs_priority.tolist(),
        strict=True,
    )
    events = zip(
        episode.ev_code.tolist(),
        episode.ev_hours.tolist(),
        map(repr, episode.ev_value.tolist()),
        strict=True,
    )
    return sorted(observations), sorted(events)
