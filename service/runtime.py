"""Put the service together from its settings: models, log, application."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.access.opening import open_authenticator
from service.api.app import Dependencies, create_app
from service.calibrate import cores
from service.engine.backends.slot_kernel import slot_library
from service.engine.metrics import EngineMetrics
from service.log.opening import open_log
from service.models.bundles import Bundles
from service.models.version import Name
from service.settings import Settings
from service.tracing import open_tracing


def _slot_kernel(settings: Settings) -> str | None:
    """What attends over slots on a CPU: "compiled" or "reference"; None where torch does not."""
    if settings.backend != "torch-cpu":
        return None
    return "reference" if slot_library() is None else "compiled"


def build_app(
    settings: Settings, on_fatal: Callable[[BaseException], None] = lambda error: None
) -> FastAPI:
    """The whole service. Its engines start and stop with the application's lifespan.

    `on_fatal` is called, on any thread, when only a new process can help.

    Raises BundleError, RowDependenceError, LogUnavailable, OSError for a file of clients that
    cannot be read, and ValueError for a network, a backend or clients that do not do.
    """
    authenticator = open_authenticator(settings)
    # One core is left to the event loop and the log.
    torch.set_num_threads(settings.torch_threads or max(cores() - 1, 1))
    registry = CollectorRegistry()
    tracing = open_tracing(settings.tracing)
    bundles = Bundles(settings, EngineMetrics(registry, settings.bundle), on_fatal, tracing)
    name, _, version = settings.bundle.partition("/")
    app = create_app(
        settings,
        Dependencies(
            model=bundles.open(Name(name, int(version))),
            authenticator=authenticator,
            log=open_log(settings),
            loader=bundles,
            registry=registry,
            process=lambda: {
                "threads": torch.get_num_threads(),
                "slot_kernel": _slot_kernel(settings),
            },
            tracing=tracing,
        ),
    )
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # A full collection walks every object of torch and transformers, which takes long enough to
        # be felt by a request and finds nothing: they live until a model is unloaded.
        gc.collect()
        gc.freeze()
        # Log entries are many and in no circle. At the usual pace of collections a log is read more
        # slowly for them than for the reading; at a much slower one a single collection is felt.
        gc.set_threshold(5_000, 10, 100)
        async with serve(app):
            yield

    app.router.lifespan_context = lifespan
    return app
