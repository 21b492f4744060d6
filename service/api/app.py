"""The FastAPI application, put together from its parts. Nothing is global."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from llm4ehr import __version__
from service import timing
from service.api import embeddings, episodes, observations, oip, openapi, operator, problems, risk
from service.api.deps import Context
from service.api.limits import LimitClients
from service.api.metrics import Metrics, Observe
from service.api.pulse import Pulse
from service.api.window import Window
from service.core import Engine
from service.episodes import EpisodeService
from service.lifecycle import Lifecycle
from service.log.base import EventLog
from service.settings import Settings
from service.units import EventVocabulary

_DESCRIPTION = """\
Risk of deterioration, mortality, phenotypes and remaining length of stay for every hour of an
ICU stay, from observations and events as they come: late, corrected, withdrawn, out of order.

Times are RFC 3339 with an offset from UTC. Hours count from ICU admission: hour *t* is
[*t*, *t* + 1). What a 2xx acknowledges is durable. Errors are RFC 9457 problem details.
"""


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """What the app is built on. It closes the log when it shuts down, and nothing else."""

    log: EventLog
    engine: Engine
    vocabulary: EventVocabulary
    clock: Callable[[], datetime] = _utc_now
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    """Where the instruments are registered; the engine may share it."""
    retry_after_s: Callable[[], int] = lambda: 1
    """Seconds after which the engine may have worked off what waits now."""
    describe: Callable[[], dict[str, Any]] = dict
    """What the engines say of themselves, for operators."""


def create_app(settings: Settings, deps: Dependencies) -> FastAPI:
    """An application that answers once its lifespan has begun.

    Raises ValueError for a bundle that reads later hours to score earlier ones.
    """
    if not deps.engine.bundle.causal:
        raise ValueError("the bundle is not causal: it cannot score a stay as it happens")
    metrics = Metrics(deps.registry, deps.engine.bundle)
    lifecycle = Lifecycle()
    window = Window(deps.registry, list(operator.HISTOGRAMS))
    pulse = Pulse(metrics, window)

    def committed(seconds: float) -> None:
        metrics.commit_seconds.observe(seconds)
        timing.add("log", seconds)

    service = EpisodeService(
        log=deps.log,
        engine=deps.engine,
        vocabulary=deps.vocabulary,
        settings=settings,
        clock=deps.clock,
        on_commit=committed,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        pulse.start()
        try:
            yield
        finally:
            await pulse.stop()
            await service.stop()
            await deps.log.close()

    app = FastAPI(
        title="LLM4EHR",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = Context(
        settings=settings,
        service=service,
        engine=deps.engine,
        log=deps.log,
        metrics=metrics,
        clock=deps.clock,
        lifecycle=lifecycle,
        retry_after_s=deps.retry_after_s,
        describe=deps.describe,
        window=window,
    )
    resources = (observations, risk, embeddings, episodes, operator, oip)
    routers = [module.router for module in resources]
    for router in routers:
        app.include_router(router)
    app.add_api_route("/metrics", metrics.render, include_in_schema=False)
    if (limit := settings.max_in_flight_per_client) is not None:
        app.add_middleware(LimitClients, limit=limit, metrics=metrics)
    app.add_middleware(Observe, metrics=metrics, lifecycle=lifecycle)
    problems.install(app, metrics.refused)
    openapi.install(app, routers)
    return app
