"""What the engines tell Prometheus."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode
from service.engine.backends.shapes import slot_bytes
from service.engine.metrics import MAX_RETRY_S, EngineMetrics
from tests.online import engine_on, tiny_bundle, view_of


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_every_observation_has_its_instrument(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry, "m/1")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"llm4ehr_{name}", {"model": "m/1", **labels})

    metrics.waited(0.1)
    metrics.answered(0.2)
    metrics.tick("hours", 0.003, 12)
    metrics.tick("tokens", 0.001, 7)
    metrics.computed("new", 3)
    metrics.computed("rebuild")
    metrics.rebuilt(0.5)
    metrics.backlog(stays=4, rows=9)
    metrics.memory(used=5, free=6, lost=7, kv_bytes=8)
    metrics.evicted(2)
    metrics.ran_out_of_memory()
    metrics.faulted()
    assert value("engine_queue_seconds_sum") == 0.1
    assert value("engine_answer_seconds_sum") == 0.2
    assert value("engine_tick_seconds_sum", kind="hours") == 0.003
    assert value("engine_tick_rows_sum", kind="tokens") == 7
    assert value("engine_rows_total", cause="new") == 3
    assert value("engine_rows_total", cause="rebuild") == 1
    assert value("engine_rebuild_seconds_sum") == 0.5
    assert (value("engine_pending_stays"), value("engine_pending_rows")) == (4, 9)
    assert [value("kv_slots", state=s) for s in ("used", "free", "lost")] == [5, 6, 7]
    assert value("kv_bytes") == 8
    assert value("kv_evictions_total") == 2
    assert value("engine_out_of_memory_total") == value("engine_model_faults_total") == 1
    # Zeros are there from the start: an alarm on a rise needs them.
    assert value("engine_mismatch_total") == 0


def test_engines_of_one_process_are_told_apart(registry: CollectorRegistry) -> None:
    first = EngineMetrics(registry, "m/1")
    second = first.of("m/2")
    first.backlog(stays=1, rows=10)
    second.backlog(stays=2, rows=20)
    found = [
        registry.get_sample_value("llm4ehr_engine_pending_rows", {"model": m})
        for m in ("m/1", "m/2")
    ]
    assert found == [10, 20]


@pytest.mark.anyio
async def test_an_engine_tells_its_memory_and_its_rows(
    registry: CollectorRegistry,
    tiny_network: Callable[..., Network],
    random_episode: Callable[..., Episode],
    anyio_backend: str,
) -> None:
    bundle = tiny_bundle(tiny_network)
    async with engine_on(bundle, n_slots=3, registry=registry) as engine:
        await engine.submit(view_of(random_episode(1, 5)))
        await engine.submit(view_of(random_episode(1, 5), seq=2))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"llm4ehr_{name}", {"model": "", **labels})

    assert value("kv_bytes") == 3 * slot_bytes(bundle.network)
    assert value("engine_rows_total", cause="new") == 5
    assert value("engine_queue_seconds_count") == 1  # nothing was to be computed for the second
    assert value("engine_answer_seconds_count") == 2
    assert value("engine_tick_rows_sum", kind="hours") == 5


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 1), (50, 1), (250, 3), (1_000_000, MAX_RETRY_S)]
)
def test_when_to_ask_again_follows_backlog_and_pace(
    registry: CollectorRegistry, rows: int, expected: int
) -> None:
    metrics = EngineMetrics(registry)
    for _ in range(3):
        metrics.tick("hours", 0.32, 32)  # a hundred rows a second
    metrics.backlog(stays=1, rows=rows)
    assert metrics.retry_after_s() == expected


def test_before_the_first_tick_nothing_is_known_of_the_pace(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry)
    metrics.backlog(stays=1, rows=10_000)
    assert metrics.retry_after_s() == 1
