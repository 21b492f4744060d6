"""What the engines tell Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from itertools import count

import pytest
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Network
from llm4ehr.episode import Episode
from service.engine.backends.shapes import slot_bytes
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import OnlineEngine
from service.engine.metrics import MAX_RETRY_S, EngineMetrics, TickKind
from tests.online import NUMERICS, ROWS, Gate, engine_on, tiny_bundle, view_of


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
    metrics.backlog(stays=4, rows=9, ticks={"hours": 1})
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
    first.backlog(stays=1, rows=10, ticks={"hours": 1})
    second.backlog(stays=2, rows=20, ticks={"hours": 1})
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


@pytest.mark.parametrize(("ticks", "expected"), [(0, 1), (1, 1), (8, 3), (1_000_000, MAX_RETRY_S)])
@pytest.mark.parametrize("rows", [1, 32])
def test_when_to_ask_again_follows_backlog_and_pace(
    registry: CollectorRegistry, ticks: int, expected: int, rows: int
) -> None:
    metrics = EngineMetrics(registry)
    for _ in range(3):
        metrics.tick("hours", 0.32, rows)  # the tick takes its time, however few rows it had
    metrics.backlog(stays=1, rows=1, ticks={"hours": ticks})
    assert metrics.retry_after_s() == expected


def test_each_kind_of_tick_has_its_pace(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry)
    metrics.tick("hours", 2.0, 1)
    metrics.tick("tokens", 0.5, 1)
    metrics.backlog(stays=1, rows=1, ticks={"hours": 1, "tokens": 4})
    assert metrics.retry_after_s() == 4


def test_before_the_first_tick_nothing_is_known_of_the_pace(registry: CollectorRegistry) -> None:
    metrics = EngineMetrics(registry)
    metrics.backlog(stays=1, rows=10_000, ticks={"hours": 500})
    assert metrics.retry_after_s() == 1


@pytest.mark.anyio
async def test_stays_that_are_not_read_yet_count(
    registry: CollectorRegistry,
    tiny_network: Callable[..., Network],
    random_episode: Callable[..., Episode],
    anyio_backend: str,
) -> None:
    """The clock is so fast that one of them is read before every tick."""
    bundle = tiny_bundle(tiny_network)
    backend = Gate(TorchCpuBackend(bundle.network, n_slots=4, max_rows=ROWS))
    seen: list[tuple[int, int, int]] = []

    class Watched(EngineMetrics):
        def backlog(self, stays: int, rows: int, ticks: Mapping[TickKind, int]) -> None:
            seen.append((stays, rows, ticks["hours"]))
            super().backlog(stays, rows, ticks)

    engine = OnlineEngine(
        bundle, backend, Watched(registry), max_pending=9, numerics=NUMERICS, clock=count().__next__
    )
    engine.start()
    try:
        backend.open.clear()
        first = engine.submit(view_of(random_episode(0, 1)))
        await asyncio.to_thread(backend.entered.wait, 60)
        views = [view_of(random_episode(seed, 20)) for seed in (1, 2, 3, 4)]
        futures = [first, *(engine.submit(view) for view in views)]
        backend.open.set()
        await asyncio.gather(*futures)
    finally:
        engine.close()
    # After a tick with 16 of the 20 hours of the stay that was read.
    assert (4, 4 + 3 * 20, 4) in seen
