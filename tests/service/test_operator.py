"""What an operator sees: figures of the last minutes, counts, the state of everything."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram

from llm4ehr import __version__
from service.api.operator import SummaryOut
from service.api.window import SPAN_S, Window
from service.engine.metrics import EngineMetrics
from tests.service.fakes import BUNDLE, Client, hr, running, stamp

pytestmark = pytest.mark.anyio

CANARY = "CANARY-0815"


async def summary(client: Client) -> dict[str, Any]:
    response = await client.http.get("/operator/summary")
    assert response.status_code == 200
    assert CANARY not in response.text
    body: dict[str, Any] = response.json()
    return body


async def test_the_summary_tells_the_state(client: Client) -> None:
    await client.post(CANARY, admitted_at=stamp(0), observations=[hr(4711)])
    await client.post(CANARY, admitted_at=stamp(0), observations=[hr(80)])
    await client.risk(CANARY)
    client.engine.full = True
    await client.risk(CANARY, as_of=1, hour=0)
    body = await summary(client)
    assert body["service"]["version"] == __version__
    assert (body["service"]["ready"], body["service"]["draining"]) == (True, False)
    assert body["model"]["digest"] == BUNDLE.digest
    assert body["catch_up"] == {"complete": True, "episodes": 1, "to_score": 0, "scored": 0}
    assert body["log"] == {"available": True, "waiting_writes": 0}
    commit = body["last"]["figures"]["commit"]
    assert commit["per_second"] * body["last"]["seconds"] == pytest.approx(1)
    assert 0 < commit["p50"] <= commit["p99"]
    assert body["last"]["figures"]["engine_tick"] == {"per_second": 0, "p50": None, "p99": None}
    client.app.state.context.lifecycle.draining = True
    body = await summary(client)
    assert (body["service"]["ready"], body["service"]["draining"]) == (False, True)
    await client.log.close()
    assert (await summary(client))["log"]["available"] is False


async def test_the_example_is_true(client: Client) -> None:
    document = (await client.http.get("/openapi.json")).json()
    answer = document["paths"]["/operator/summary"]["get"]["responses"]["200"]
    example = SummaryOut.model_validate(answer["content"]["application/json"]["example"])
    assert set(example.last.figures) == set((await summary(client))["last"]["figures"])


async def test_counts_of_all_engines_are_added(client: Client) -> None:
    metrics = EngineMetrics(client.app.state.context.metrics.registry, "m/1")
    for engine in (metrics, metrics.of("m/2")):
        engine.evicted(2)
        engine.computed("new", 5)
        engine.mismatched()
    found = (await summary(client))["since_start"]
    assert found["evictions"] == 4
    assert found["rows"]["new"] == 10
    assert (found["audits"], found["mismatches"]) == (0, 2)


class Window1:
    """A window on one histogram, with a clock that is moved."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.now = 0.0
        self.histogram = Histogram("h", "h", ["a"], buckets=(1, 2, 4), registry=registry)
        self.window = Window(registry, ["h"], clock=lambda: self.now)

    def observe(self, *values: float) -> None:
        for i, value in enumerate(values):
            self.histogram.labels(str(i % 2)).observe(value)

    def read(self) -> tuple[float, float | None, float | None]:
        _, figures = self.window.figures()
        found = figures["h"]
        return found.per_second, found.p50, found.p99


def test_quantiles_are_interpolated_within_a_bucket() -> None:
    one = Window1()
    assert one.read() == (0, None, None)
    one.now = 10
    assert one.read() == (0, None, None)
    one.observe(0.5, 1.5, 1.5, 3)
    # Half of the four are below the middle of the bucket from 1 to 2, 99 in 100 below 3.92.
    assert one.read() == (0.4, 1.5, pytest.approx(3.92))
    one.observe(*[100.0] * 1000)
    assert one.read()[1:] == (4, 4)  # nothing is known beyond the last bound


def test_what_is_long_past_is_forgotten() -> None:
    one = Window1()
    one.observe(0.5)
    for _ in range(30):
        one.now += SPAN_S / 10
        one.window.sample()
    assert one.read() == (0, None, None)
    seconds, _ = one.window.figures()
    assert seconds == pytest.approx(SPAN_S)
    one.observe(3)
    assert one.read()[1] == 3


async def test_pauses_of_the_collector_and_lag_are_observed(
    log_path: Any, anyio_backend: str
) -> None:
    async with running(log_path) as client:
        gc.collect()
        metrics = client.app.state.context.metrics
        pulse = metrics.registry.get_sample_value
        while not pulse("llm4ehr_gc_pause_seconds_count", {"generation": "2"}):
            await client.settle()
        assert pulse("llm4ehr_event_loop_lag_seconds_count", {}) >= 1
    n = len(gc.callbacks)
    async with running(log_path):
        assert len(gc.callbacks) == n + 1
    assert len(gc.callbacks) == n
