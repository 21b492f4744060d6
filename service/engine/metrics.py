"""Prometheus metrics of the engine."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class EngineMetrics:
    """Names follow docs/operations.md. Carries no patient data: no label is an episode."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step_seconds = Histogram(
            "llm4ehr_engine_step_seconds",
            "Time of one tick in the backend",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "llm4ehr_engine_batch_rows", "Rows of one tick", buckets=_ROWS, registry=registry
        )
        self.queue_seconds = Histogram(
            "llm4ehr_engine_queue_seconds",
            "Time from submission of an episode to its scores",
            buckets=_SECONDS,
            registry=registry,
        )
        self.pending = Gauge(
            "llm4ehr_engine_pending_stays", "Stays with hours to compute", registry=registry
        )
        self.slots = Gauge("llm4ehr_kv_slots", "KV slots", ["state"], registry=registry)
        self.evictions = Counter(
            "llm4ehr_kv_evictions_total", "Slots taken from one stay for another", registry=registry
        )
        self.rows = Counter(
            "llm4ehr_engine_rows_total",
            "Hours computed: new ones, and ones computed again",
            ["kind"],
            registry=registry,
        )
