"""Prometheus metrics of the engines. No label and no value names an episode.

The names are explained in docs/operations.md. All engines of a process share one registry: each
observes through its own `EngineMetrics`, whose samples carry the model version as a label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TickKind = Literal["hours", "tokens"]
"""Rows of the series pass, or of the event pass."""

Cause = Literal["new", "correction", "rebuild", "past"]
"""Why a row is computed: the first time; again since its features changed; again only to fill a
slot; for a view of the past, or an audit."""

MAX_RETRY_S = 30

SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Bounds of the buckets of times; fine where they should lie."""

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

# Weight of the newest tick in the running mean of the time of a tick.
_SMOOTHING = 0.05


class _Families:
    """The instruments of all engines."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, ["model", *labels], buckets=SECONDS, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ["model", *labels], registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model", *labels], registry=registry)

        self.queue = seconds(
            "llm4ehr_engine_queue_seconds",
            "Time from submission of a stay to the end of the first tick with a row of it",
        )
        self.answer = seconds(
            "llm4ehr_engine_answer_seconds", "Time from submission of a stay to its scores"
        )
        self.tick = seconds(
            "llm4ehr_engine_tick_seconds", "Time of one tick in the backend", "kind"
        )
        self.rebuild = seconds(
            "llm4ehr_engine_rebuild_seconds", "Time from the start of a rebuild to its end"
        )
        self.tick_rows = Histogram(
            "llm4ehr_engine_tick_rows",
            "Rows of one tick that somebody reads",
            ["model", "kind"],
            buckets=_ROWS,
            registry=registry,
        )
        self.rows = counter("llm4ehr_engine_rows_total", "Rows computed, by cause", "cause")
        self.pending_stays = gauge("llm4ehr_engine_pending_stays", "Stays with rows to compute")
        self.pending_rows = gauge("llm4ehr_engine_pending_rows", "Rows to compute")
        self.slots = gauge("llm4ehr_kv_slots", "Slots for keys and values", "state")
        self.kv_bytes = gauge("llm4ehr_kv_bytes", "Memory of all slots")
        self.evictions = counter(
            "llm4ehr_kv_evictions_total", "Slots taken from one stay for another"
        )
        self.out_of_memory = counter(
            "llm4ehr_engine_out_of_memory_total", "Ticks the device had no memory for"
        )
        self.model_faults = counter(
            "llm4ehr_engine_model_faults_total", "Stays for which the model gave no finite number"
        )
        self.mismatches = counter(
            "llm4ehr_engine_mismatch_total",
            "Hours computed again that gave other bits; must stay 0",
        )


class EngineMetrics:
    """What one engine observes. Its methods may be called from any thread.

    `model` is NAME/VERSION. Several engines of one registry: `EngineMetrics(registry, a)`, and
    `.of(b)` of that for the others.
    """

    def __init__(
        self, registry: CollectorRegistry, model: str = "", *, families: _Families | None = None
    ) -> None:
        self._registry = registry
        self._families = of = families or _Families(registry)
        self._seconds_per_tick: dict[TickKind, float] = {}
        self._pending_ticks: Mapping[TickKind, int] = {}
        # Looked up once: by labels it takes as long as the observation itself.
        self._queue = of.queue.labels(model)
        self._answer = of.answer.labels(model)
        self._tick = {kind: of.tick.labels(model, kind) for kind in get_args(TickKind)}
        self._tick_rows = {kind: of.tick_rows.labels(model, kind) for kind in get_args(TickKind)}
        self._rebuild = of.rebuild.labels(model)
        self._rows = {cause: of.rows.labels(model, cause) for cause in get_args(Cause)}
        self._pending_stays = of.pending_stays.labels(model)
        self._pending_rows = of.pending_rows.labels(model)
        self._slots = {s: of.slots.labels(model, s) for s in ("used", "free", "lost")}
        self._kv_bytes = of.kv_bytes.labels(model)
        self._evictions = of.evictions.labels(model)
        self._out_of_memory = of.out_of_memory.labels(model)
        self._model_faults = of.model_faults.labels(model)
        self._mismatches = of.mismatches.labels(model)

    def of(self, model: str) -> EngineMetrics:
        """The metrics of another engine of the same process."""
        return EngineMetrics(self._registry, model, families=self._families)

    def waited(self, seconds: float) -> None:
        """The first tick with a row of a submitted stay has ended, so long after submission."""
        self._queue.observe(seconds)

    def answered(self, seconds: float) -> None:
        """A submitted stay has its scores, so long after submission."""
        self._answer.observe(seconds)

    def tick(self, kind: TickKind, seconds: float, rows: int) -> None:
        """The backend computed a tick of `rows` rows that somebody reads."""
        self._tick[kind].observe(seconds)
        self._tick_rows[kind].observe(rows)
        mean = self._seconds_per_tick.get(kind, seconds)
        self._seconds_per_tick[kind] = mean + _SMOOTHING * (seconds - mean)

    def computed(self, cause: Cause, rows: int = 1) -> None:
        """So many rows were computed for this cause."""
        self._rows[cause].inc(rows)

    def rebuilt(self, seconds: float) -> None:
        """A whole stay was computed again, so long after its first row was due."""
        self._rebuild.observe(seconds)

    def backlog(self, stays: int, rows: int, ticks: Mapping[TickKind, int]) -> None:
        """What waits to be computed now, and how many ticks it takes at least."""
        self._pending_ticks = ticks
        self._pending_stays.set(stays)
        self._pending_rows.set(rows)

    def memory(self, *, used: int, free: int, lost: int = 0, kv_bytes: int = 0) -> None:
        """Slots owned, free, and given back for want of memory; bytes of all that are left."""
        self._slots["used"].set(used)
        self._slots["free"].set(free)
        self._slots["lost"].set(lost)
        self._kv_bytes.set(kv_bytes)

    def evicted(self, slots: int) -> None:
        """So many slots were taken from one stay for another."""
        self._evictions.inc(slots)

    def ran_out_of_memory(self) -> None:
        """The device had no memory for a tick."""
        self._out_of_memory.inc()

    def faulted(self) -> None:
        """The model gave a number that is not finite, and a stay was dropped."""
        self._model_faults.inc()

    def mismatched(self) -> None:
        """An hour that was computed again gave other bits than before."""
        self._mismatches.inc()

    def retry_after_s(self) -> int:
        """When to ask again: the time that the backlog takes at the measured pace, 1 to 30."""
        # Times of ticks: that of a row depends on how many share its tick.
        pace = self._seconds_per_tick
        seconds = sum(n * pace.get(kind, 0.0) for kind, n in self._pending_ticks.items())
        return min(max(math.ceil(seconds), 1), MAX_RETRY_S)
