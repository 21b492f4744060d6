"""Traces: what is in them, what never is, and that they cost nothing when they are off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode
from service.tracing_otel import OtelTracing
from tests.online import engine_on, tiny_bundle, view_of
from tests.service.fakes import Client, hr, running, stamp

pytestmark = pytest.mark.anyio

CANARY = "CANARY-0815"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> OtelTracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return OtelTracing(provider)


@pytest.fixture
async def client(tracing: OtelTracing, log_path: Path, anyio_backend: str) -> AsyncIterator[Client]:
    async with running(log_path, tracing=tracing) as client:
        yield client


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_a_request_continues_the_trace_of_its_client(
    client: Client, spans: InMemorySpanExporter
) -> None:
    await client.http.post(
        "/episodes/e/observations",
        json={"admitted_at": stamp(0), "observations": [hr()]},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )
    [request] = named(spans, "POST /episodes/{episode_id}/observations")
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/episodes/{episode_id}/observations",
        "http.response.status_code": 200,
    }
    [commit] = named(spans, "ingest.commit")
    assert commit.parent is not None
    assert commit.parent.span_id == request.context.span_id
    assert request.start_time <= commit.start_time <= commit.end_time <= request.end_time


async def test_what_a_client_adds_to_its_trace_is_not_carried_on(
    client: Client, spans: InMemorySpanExporter
) -> None:
    traceparent = f"00-{TRACE}-{PARENT}-01"
    await client.http.get(
        "/episodes", headers={"traceparent": traceparent, "tracestate": f"vendor={CANARY}"}
    )
    [span] = spans.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert not span.context.trace_state
    assert CANARY not in span.to_json()


async def test_what_a_client_declines_is_not_traced(
    client: Client, spans: InMemorySpanExporter
) -> None:
    await client.http.get("/episodes", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not spans.get_finished_spans()


async def test_probes_and_scrapes_are_not_traced(
    client: Client, spans: InMemorySpanExporter
) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/metrics", "/operator/summary"):
        assert (await client.http.get(path)).status_code == 200
    assert not spans.get_finished_spans()


async def test_nothing_of_a_patient_is_in_a_span(
    client: Client, spans: InMemorySpanExporter
) -> None:
    client.engine.secret = f"failed on {CANARY}"
    item = hr(4711.25, id=CANARY)
    await client.post(CANARY, admitted_at=stamp(0), observations=[item, hr(81), hr(82)])
    await client.risk(CANARY, min_seq=1)
    await client.http.request(CANARY, f"/episodes/{CANARY}")
    await client.http.get(f"/{CANARY}?{CANARY}={CANARY}", headers={"X": CANARY})
    client.engine.broken = True
    assert (await client.risk(CANARY, as_of=2)).status_code == 500
    finished = spans.get_finished_spans()
    assert len(finished) >= 6
    assert [s.status.status_code for s in finished].count(StatusCode.ERROR) == 1
    for span in finished:
        assert CANARY not in span.to_json()
        assert "4711" not in span.to_json()
        assert not span.events  # where exceptions would be


async def test_the_queue_is_part_of_a_request_and_a_tick_serves_many(
    tracing: OtelTracing, spans: InMemorySpanExporter
) -> None:
    async def submit() -> object:
        with tracing._tracer.start_as_current_span("request"):
            return tracing.here()

    assert tracing.here() is None
    first, second = await asyncio.gather(submit(), submit())
    tracing.waited(first, 0.25)
    tracing.ticked("hours", 0.5, 3, [first, None, second, first])
    # What nobody who is traced waits for leaves no trace.
    tracing.waited(None, 1)
    tracing.ticked("hours", 1, 3, [None])
    requests = [span.context.span_id for span in named(spans, "request")]
    [queue] = named(spans, "engine.queue")
    assert queue.parent is not None
    assert queue.parent.span_id == requests[0]
    assert queue.end_time - queue.start_time == 250_000_000
    [tick] = named(spans, "engine.tick")
    assert tick.parent is None
    assert [link.context.span_id for link in tick.links] == requests
    assert tick.attributes == {"llm4ehr.tick.kind": "hours", "llm4ehr.tick.rows": 3}
    assert tick.end_time - tick.start_time == 500_000_000


async def test_the_engine_traces_what_was_asked_for_in_a_trace(
    tracing: OtelTracing,
    spans: InMemorySpanExporter,
    tiny_network: Callable[..., Network],
    random_episode: Callable[..., Episode],
    anyio_backend: str,
) -> None:
    async with engine_on(tiny_bundle(tiny_network), tracing=tracing) as engine:
        await engine.submit(view_of(random_episode(1, 5)))
        assert not spans.get_finished_spans()
        with tracing._tracer.start_as_current_span("request"):
            await engine.submit(view_of(random_episode(2, 5)))
    [request], [queue] = named(spans, "request"), named(spans, "engine.queue")
    assert queue.parent is not None
    assert queue.parent.span_id == request.context.span_id
    ticks = named(spans, "engine.tick")
    assert sum(tick.attributes["llm4ehr.tick.rows"] for tick in ticks) == 5
    assert {link.context.span_id for tick in ticks for link in tick.links} == {
        request.context.span_id
    }


@pytest.mark.parametrize(("to", "imported"), [("none", False), ("console", True)])
def test_it_is_imported_only_if_it_is_used(to: str, imported: bool) -> None:
    code = (
        "import sys; from service.tracing import open_tracing; import service.api; "
        f"open_tracing({to!r}).close(); print('opentelemetry.sdk' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(imported)
