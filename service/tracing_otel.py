"""Traces with OpenTelemetry. Needs the extra `otel`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Literal

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
)
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm4ehr import __version__
from service import logs
from service.tracing import Tracing, labels_of

# Probes and scrapes would drown what is of interest.
_NOT_TRACED = ("/v2/health", "/metrics", "/operator")

_MAX_LINKS = 128

# The exporter would go on trying for longer than a stop should take.
_CLOSE_S = 2.0


def exporting(to: Literal["console", "otlp"]) -> Tracing:
    """Spans to the standard output, or to the collector that the OTEL_EXPORTER_OTLP_ variables
    name.
    """
    exporter: SpanExporter
    if to == "console":
        exporter = ConsoleSpanExporter()
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    resource = Resource.create({"service.name": "llm4ehr", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracing(provider)


class OtelTracing(Tracing):
    """Spans of requests, of appends to the log, of the engine's queue and of its ticks."""

    on = True

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("llm4ehr", __version__)

    def install(self, app: FastAPI) -> None:
        app.add_middleware(_TraceRequests, tracer=self._tracer)

    def here(self) -> SpanContext | None:
        context = trace.get_current_span().get_span_context()
        return context if context.is_valid and context.trace_flags.sampled else None

    def committed(self, seconds: float) -> None:
        if (where := self.here()) is not None:
            self._record("ingest.commit", seconds, where)

    def waited(self, where: SpanContext | None, seconds: float) -> None:
        if where is not None:
            self._record("engine.queue", seconds, where)

    def ticked(
        self, kind: str, seconds: float, rows: int, wheres: Sequence[SpanContext | None]
    ) -> None:
        """A tick serves many requests and is the child of none: it links to them."""
        spans = {where.span_id: where for where in wheres if where is not None}
        links = [Link(where) for where in spans.values()]
        if not links:
            return
        ended = time.time_ns()
        self._tracer.start_span(
            "engine.tick",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            attributes={"llm4ehr.tick.kind": kind, "llm4ehr.tick.rows": rows},
            links=links[:_MAX_LINKS],
            start_time=ended - int(seconds * 1e9),
        ).end(ended)

    def close(self) -> None:
        """Send what is left, if the collector takes it in time."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_CLOSE_S)

    def _record(self, name: str, seconds: float, parent: SpanContext) -> None:
        """A span that ends now."""
        ended = time.time_ns()
        context = trace.set_span_in_context(NonRecordingSpan(parent))
        span = self._tracer.start_span(name, context=context, start_time=ended - int(seconds * 1e9))
        span.end(ended)


class _TraceRequests:
    """ASGI middleware: one span a request, within the trace that the client names, if it does."""

    def __init__(self, app: ASGIApp, *, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_NOT_TRACED):
            await self._app(scope, receive, send)
            return
        # `tracestate` is free text, which every span would carry on.
        traceparent: bytes = dict(scope["headers"]).get(b"traceparent", b"")
        carrier = {"traceparent": traceparent.decode("latin-1")}
        span = self._tracer.start_span(
            "request", context=self._propagator.extract(carrier), kind=SpanKind.SERVER
        )

        if (here := span.get_span_context()).is_valid:
            logs.within_span(here.trace_id, here.span_id)

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            # The exception is not recorded: its message may quote a value.
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, watch)
        except Exception:
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            method, route = labels_of(scope)
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.request.method": method, "http.route": route})
            span.end()
