"""The FastAPI application, put together from its parts. Nothing is global."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry
from starlette.concurrency import run_in_threadpool

from llm4ehr import __version__
from service import timing
from service.access.authenticator import Authenticator
from service.access.principal import Scope
from service.api import (
    embeddings,
    episodes,
    models,
    observations,
    oip,
    openapi,
    operator,
    problems,
    risk,
)
from service.api.access import Requires
from service.api.deps import Context
from service.api.envelope import Envelope
from service.api.limits import Limits
from service.api.metrics import Metrics, Observe
from service.api.open_demo import OpenDemo, warn
from service.api.pulse import Pulse
from service.api.room import Room
from service.api.trail import AuditTrail
from service.api.window import Window
from service.audit import Auditor
from service.episodes import EpisodeService
from service.follow import Follower
from service.lifecycle import Lifecycle
from service.log.base import EventLog
from service.memory import Memory
from service.models.manager import Models
from service.models.version import Loader, Model
from service.settings import Settings
from service.tracing import OFF, Tracing
from service.trail.keeper import Trail

_logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Risk of deterioration, mortality, phenotypes and remaining length of stay for every hour of an
ICU stay, from observations and events as they come: late, corrected, withdrawn, out of order.

Times are RFC 3339 with an offset from UTC. Hours count from ICU admission: hour *t* is
[*t*, *t* + 1). What a 2xx acknowledges is durable. Errors are RFC 9457 problem details.
"""


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody caught. The loop's own message may quote a value, and so may the error's."""
    error = context.get("exception")
    frames = "".join(traceback.format_tb(error.__traceback__)) if error is not None else ""
    _logger.error("unhandled in the background: %s\n%s", type(error).__name__, frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """What the app is built on. It starts the model, and closes all of it when it shuts down."""

    log: EventLog
    authenticator: Authenticator
    model: Model
    """What answers first."""
    loader: Loader | None = None
    """Where further models come from."""
    clock: Callable[[], datetime] = _utc_now
    monotonic: Callable[[], float] = time.monotonic
    """Seconds by which the requests of clients are counted."""
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    """Where the instruments are registered; the engine may share it."""
    process: Callable[[], dict[str, Any]] = dict
    """What the process says of itself, for operators."""
    tracing: Tracing = OFF
    random: Random = field(default_factory=Random)
    """Picks the stays that are audited."""


def create_app(settings: Settings, deps: Dependencies) -> FastAPI:
    """An application that answers once its lifespan has begun.

    Raises ValueError for a bundle that reads later hours to score earlier ones.
    """
    bundle = deps.model.engine.bundle
    if not bundle.causal:
        raise ValueError("the bundle is not causal: it cannot score a stay as it happens")
    is_open = settings.authentication == "open"
    metrics = Metrics(deps.registry, bundle)
    metrics.watch_log(deps.log.available)
    lifecycle = Lifecycle()
    window = Window(deps.registry, list(operator.HISTOGRAMS))
    pulse = Pulse(metrics, window)

    log, tracing = deps.log, deps.tracing

    def committed(seconds: float) -> None:
        metrics.commit_seconds.observe(seconds)
        timing.add("log", seconds)
        tracing.committed(seconds)

    memory = Memory(deps.log, settings.cached_entries)
    loaded = Models(
        deps.model,
        settings=settings,
        log=deps.log,
        memory=memory,
        clock=deps.clock,
        registry=deps.registry,
        loader=deps.loader,
        on_active=metrics.serves,
        on_published=metrics.published_seconds.observe,
    )
    memory.on_lost = loaded.forget
    follower = Follower(deps.log, memory, loaded, deps.registry)
    auditor = Auditor(
        loaded,
        deps.log,
        memory,
        deps.registry,
        interval_s=settings.audit_interval_seconds if settings.scoring_enabled else None,
        random=deps.random,
    )
    service = EpisodeService(
        log=deps.log,
        memory=memory,
        models=loaded,
        settings=settings,
        clock=deps.clock,
        on_commit=committed,
    )

    trail = Trail(deps.log, deps.registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()
        loop.set_exception_handler(_report)
        # Makes the framework import what it needs to answer: later there may be no descriptor left.
        await run_in_threadpool(lambda: None)
        await log.open()
        trail.start()
        service.start()
        follower.start()
        auditor.start()
        pulse.start()
        warning = asyncio.create_task(warn()) if is_open else None
        try:
            yield
        finally:
            if warning is not None:
                warning.cancel()
            await pulse.stop()
            await auditor.stop()
            await follower.stop()
            await service.stop()
            await trail.stop()
            await log.close()
            await asyncio.to_thread(tracing.close)
            loop.set_exception_handler(before)

    app = FastAPI(
        title="LLM4EHR",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        # Their pages load scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        # Ours is made once.
        openapi_url=None,
    )
    app.state.context = Context(
        settings=settings,
        service=service,
        models=loaded,
        follower=follower,
        log=deps.log,
        authenticator=deps.authenticator,
        limits=Limits(
            settings.requests_per_second_per_client,
            settings.max_in_flight_per_client,
            deps.monotonic,
        ),
        metrics=metrics,
        clock=deps.clock,
        lifecycle=lifecycle,
        process=deps.process,
        window=window,
    )
    modules = (observations, risk, embeddings, episodes, models, operator, oip)
    routers = [module.router for module in modules]
    for router in routers:
        app.include_router(router)
    app.add_api_route(
        "/metrics",
        metrics.render,
        include_in_schema=False,
        dependencies=[Depends(Requires(Scope.METRICS, Scope.ADMIN))],
    )
    # What is added later is further out.
    app.add_middleware(AuditTrail, trail=trail, clock=deps.clock)
    deps.tracing.install(app)
    app.add_middleware(Room, refused=metrics.refused)
    if is_open:
        app.add_middleware(OpenDemo, host=settings.host)
    app.add_middleware(Observe, metrics=metrics, lifecycle=lifecycle)
    app.add_middleware(Envelope, metrics=metrics)
    problems.install(app, metrics.refused)
    openapi.install(app, routers)
    return app
