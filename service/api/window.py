"""Rates and quantiles of the last minutes, read off the histograms that Prometheus reads too."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

SPAN_S = 300.0
INTERVAL_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of the observations within a time; quantiles are None without any."""

    per_second: float
    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    time: float
    buckets: dict[str, dict[float, float]]  # histogram -> upper bound -> observations up to it


class Window:
    """Compares what histograms say now with what they said at most `SPAN_S` ago.

    Whoever owns it calls `sample` every `INTERVAL_S`. Samples of all labels are added up.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        names: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry.restricted_registry([f"{name}_bucket" for name in names])
        self._names = tuple(names)
        self._clock = clock
        self._past = deque([self._read()])

    def sample(self) -> None:
        """Remember what the histograms say now."""
        self._past.append(self._read())
        while len(self._past) > 1 and self._past[1].time <= self._past[-1].time - SPAN_S:
            self._past.popleft()

    def figures(self) -> tuple[float, dict[str, Figures]]:
        """Seconds that are looked back on, and the figures of every histogram."""
        now, then = self._read(), self._past[0]
        seconds = now.time - then.time
        return seconds, {
            name: _figures(now.buckets.get(name, {}), then.buckets.get(name, {}), seconds)
            for name in self._names
        }

    def _read(self) -> _Snapshot:
        found: dict[str, dict[float, float]] = {}
        for family in self._registry.collect():
            buckets = found.setdefault(family.name, {})
            for sample in family.samples:
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
        return _Snapshot(self._clock(), found)


def _figures(now: dict[float, float], then: dict[float, float], seconds: float) -> Figures:
    new = sorted((bound, n - then.get(bound, 0.0)) for bound, n in now.items())
    total = new[-1][1] if new else 0.0
    return Figures(
        per_second=total / seconds if seconds else 0.0,
        p50=_quantile(new, 0.5),
        p99=_quantile(new, 0.99),
    )


def _quantile(cumulative: list[tuple[float, float]], q: float) -> float | None:
    """Interpolated within a bucket; beyond the last finite bound, that bound."""
    total = cumulative[-1][1] if cumulative else 0.0
    if total <= 0:
        return None
    low, below = 0.0, 0.0
    for bound, n in cumulative:
        if n >= q * total:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (q * total - below) / (n - below)
        low, below = bound, n
    return low
