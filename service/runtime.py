"""Put the service together from its settings: bundle, backend, engine, log, application."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, load_bundle
from service.api.app import Dependencies, create_app
from service.engine.backends.factory import make_backend
from service.engine.engine import OnlineEngine
from service.engine.metrics import EngineMetrics
from service.log.sqlite import SqliteLog
from service.settings import Settings


def open_bundle(settings: Settings) -> Bundle:
    """The bundle that the settings name. Raises BundleError."""
    name, version = settings.bundle.split("/")
    return load_bundle(settings.model_repository, name, int(version))


def build_app(
    settings: Settings, on_fatal: Callable[[BaseException], None] = lambda error: None
) -> FastAPI:
    """The whole service. Its engine starts and stops with the application's lifespan.

    `on_fatal` is called, on any thread, when only a new process can help.

    Raises BundleError, RowDependenceError, LogUnavailable, and ValueError for a backend that is not
    there.
    """
    # One core is left to the event loop and the log.
    torch.set_num_threads(settings.torch_threads or max((os.cpu_count() or 2) - 1, 1))
    bundle = open_bundle(settings)
    backend = make_backend(bundle, settings)
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, settings.bundle)
    engine = OnlineEngine(
        bundle, backend, metrics, max_pending=settings.max_pending, on_fatal=on_fatal
    )
    app = create_app(
        settings,
        Dependencies(
            log=SqliteLog(settings.log_path),
            engine=engine,
            vocabulary=bundle.network.vocabulary,
            registry=registry,
            retry_after_s=metrics.retry_after_s,
            describe=lambda: {
                "threads": torch.get_num_threads(),
                "models": [{"model": settings.bundle, **asdict(engine.status())}],
            },
        ),
    )
    serve = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        # A full collection walks every object of torch and transformers, which takes long enough to
        # be felt by a request and finds nothing: they live as long as the process.
        gc.collect()
        gc.freeze()
        try:
            async with serve(app):
                yield
        finally:
            engine.close()

    app.router.lifespan_context = lifespan
    return app
