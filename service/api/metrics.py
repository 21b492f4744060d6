"""What Prometheus sees. No label carries anything about a patient."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm4ehr import __version__
from service.api.problems import KEEPS_LOAD_OFF, PROBLEMS, Problem
from service.core import BundleInfo
from service.engine.metrics import SECONDS
from service.ingest import ItemResult
from service.lifecycle import Lifecycle
from service.timing import begin
from service.tracing import labels_of

_logger = logging.getLogger(__name__)

_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


# Where the time went would tell whether a stay exists that the client may not see.
_SILENT = (403, 404)


class Metrics:
    """The instruments of the API, in a registry of their own or one shared with the engine."""

    def __init__(self, registry: CollectorRegistry, bundle: BundleInfo) -> None:
        self.registry = registry
        self.http_seconds = Histogram(
            "llm4ehr_http_request_duration_seconds",
            "Time from the request's headers to the end of the answer",
            ["method", "route", "status"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.observations = Counter(
            "llm4ehr_observations",
            "Items received: appended, late, corrected, withdrawn, duplicate, rejected",
            ["outcome"],
            registry=registry,
        )
        self.rejections = Counter(
            "llm4ehr_rejections", "Items refused, by reason", ["error"], registry=registry
        )
        self.commit_seconds = Histogram(
            "llm4ehr_ingest_commit_seconds",
            "Time until an append to the log was durable",
            buckets=SECONDS,
            registry=registry,
        )
        self.published_seconds = Histogram(
            "llm4ehr_score_published_seconds",
            "Time from a write that was committed until the scores of its view can be read",
            buckets=SECONDS,
            registry=registry,
        )
        self.loop_lag_seconds = Histogram(
            "llm4ehr_event_loop_lag_seconds",
            "How much later than it was due the event loop ran a timer",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.gc_pause_seconds = Histogram(
            "llm4ehr_gc_pause_seconds",
            "Time of one run of Python's collector of garbage",
            ["generation"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._refusals = Counter(
            "llm4ehr_refusals",
            "Requests not served to keep load off, by reason",
            ["reason"],
            registry=registry,
        )
        for name, (status, _) in PROBLEMS.items():
            if status in KEEPS_LOAD_OFF:
                self._refusals.labels(name)
        self.unauthenticated = Counter(
            "llm4ehr_unauthenticated",
            "Requests whose client was not recognised",
            registry=registry,
        )
        self._build_info = Gauge(
            "llm4ehr_build_info",
            "Version of the service and of the model it serves",
            ["version", "model", "model_version", "digest"],
            registry=registry,
        )
        self.serves(bundle)

    def watch_log(self, available: Callable[[], bool]) -> None:
        """Show whether the log can be written, as `available` says when somebody looks."""
        Gauge(
            "llm4ehr_log_available",
            "1 if the last write of the log went through, else 0",
            registry=self.registry,
        ).set_function(available)

    def count(self, result: ItemResult) -> None:
        """Count one item by what became of it."""
        self.observations.labels(_outcome(result)).inc()
        if result.error is not None:
            self.rejections.labels(result.error.type).inc()

    def serves(self, bundle: BundleInfo) -> None:
        """This model answers from now on."""
        self._build_info.clear()
        self._build_info.labels(__version__, bundle.name, bundle.version, bundle.digest).set(1)

    def refused(self, reason: str) -> None:
        """Count a request that was not served; `reason` is the name of its problem."""
        self._refusals.labels(reason).inc()

    async def render(self) -> Response:
        """All instruments in the Prometheus text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Observe:
    """ASGI middleware: times every request, and turns a crash into an answer without its text.

    Answers say where their time went. While the service drains they also end their connection, so
    that none is left to be closed under a request that is on its way.

    Starlette's own handler would re-raise, and the server would log the exception with whatever
    value its message quotes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        started = time.perf_counter()
        timing = begin()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [] if status in _SILENT else [(b"server-timing", timing.header())]
                if self._lifecycle.draining:
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            problem = Problem("internal-error", "see the log of the service")
            frames = "".join(traceback.format_tb(error.__traceback__))
            _logger.error("request failed: %s\n%s", type(error).__name__, frames)
            if status == 0:
                await problem.response(scope["path"])(scope, receive, watch)
        finally:
            method, route = labels_of(scope)
            self._metrics.http_seconds.labels(method, route, str(status)).observe(
                time.perf_counter() - started
            )


def _outcome(result: ItemResult) -> str:
    if result.status != "accepted":
        return result.status
    if result.list == "withdrawals":
        return "withdrawn"
    if result.target is not None:
        return "corrected"
    return "late" if result.late else "appended"
