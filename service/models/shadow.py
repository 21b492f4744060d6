"""A model on trial: it scores what the active one scores, and what it says is only compared."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.core import HourScore
from service.state import Scored

# Answers that wait for the other model's; the oldest is given up beyond that.
_MAX_WAITING = 4096

_SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_HOURS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ShadowMetrics:
    """What Prometheus sees of all trials. No label names a stay."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.compared = Counter(
            "llm4ehr_shadow_compared", "Answers that both models gave", registry=registry
        )
        self.dropped = Counter(
            "llm4ehr_shadow_dropped",
            "Answers of the active model that the one on trial was too slow for",
            registry=registry,
        )
        self.shares = Histogram(
            "llm4ehr_shadow_change_ratio",
            "Absolute difference of a probability in the newest hour; of phenotypes the largest",
            ["task"],
            buckets=_SHARES,
            registry=registry,
        )
        self.hours = Histogram(
            "llm4ehr_shadow_change_hours",
            "Absolute difference of the remaining stay in the newest hour, in hours",
            buckets=_HOURS,
            registry=registry,
        )


@dataclass(slots=True)
class Change:
    """Absolute differences in one task since the trial began."""

    n: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, change: float) -> None:
        self.n += 1
        self.total += change
        self.largest = max(self.largest, change)

    @property
    def mean(self) -> float:
        return self.total / self.n


@dataclass(slots=True)
class _Waiting:
    seq: int
    of_active: bool
    score: HourScore


@dataclass(slots=True)
class Shadow:
    """One trial. Both models report what they scored; equal entries are compared."""

    metrics: ShadowMetrics
    compared: int = 0
    dropped: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    _waiting: OrderedDict[str, _Waiting] = field(default_factory=OrderedDict)

    def active_scored(self, scored: Scored) -> None:
        """The active model has scores of a new entry."""
        self._scored(scored, of_active=True)

    def trial_scored(self, scored: Scored) -> None:
        """The model on trial has."""
        self._scored(scored, of_active=False)

    def _scored(self, scored: Scored, *, of_active: bool) -> None:
        view, seq = scored.view, scored.scores.seq
        if view.head_hour < 0:
            return
        mine = _Waiting(seq, of_active, scored.scores.hours[view.head_hour])
        other = self._waiting.pop(view.episode_id, None)
        if other is None:
            self._keep(view.episode_id, mine)
        elif other.seq == seq and other.of_active != of_active:
            self._compare(mine.score, other.score)
        else:
            newer, older = (other, mine) if other.seq > seq else (mine, other)
            self._give_up(older)
            self._keep(view.episode_id, newer)

    def _keep(self, episode_id: str, waiting: _Waiting) -> None:
        self._waiting[episode_id] = waiting
        if len(self._waiting) > _MAX_WAITING:
            self._give_up(self._waiting.popitem(last=False)[1])

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.of_active:
            self.dropped += 1
            self.metrics.dropped.inc()

    def _compare(self, a: HourScore, b: HourScore) -> None:
        self.compared += 1
        self.metrics.compared.inc()
        for task, change in _changes(a, b).items():
            self.changes.setdefault(task, Change()).add(change)
            if task == "remaining_los":
                self.metrics.hours.observe(change)
            else:
                self.metrics.shares.labels(task).observe(change)


def _changes(a: HourScore, b: HourScore) -> dict[str, float]:
    """Absolute difference of each task that both have."""
    pairs = {
        "decompensation": (a.decompensation, b.decompensation),
        "mortality": (a.mortality, b.mortality),
        "remaining_los": (a.remaining_los_hours, b.remaining_los_hours),
    }
    changes = {
        task: abs(x - y) for task, (x, y) in pairs.items() if x is not None and y is not None
    }
    if common := a.phenotypes.keys() & b.phenotypes.keys():
        changes["phenotyping"] = max(abs(a.phenotypes[n] - b.phenotypes[n]) for n in common)
    return changes
