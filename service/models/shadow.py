"""A model on trial: it scores what the active one scores, and what it says is only compared."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.core import EpisodeView, HourScore
from service.models.version import Name, Version
from service.state import Scored

# Answers that wait for the other model's; the oldest is given up beyond that.
_MAX_WAITING = 4096

_SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_HOURS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ShadowMetrics:
    """What Prometheus sees of all trials. No label names a stay."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.compared = Counter(
            "llm4ehr_shadow_compared", "Answers that both models gave", ["model"], registry=registry
        )
        self.dropped = Counter(
            "llm4ehr_shadow_dropped",
            "Answers of the active model that the one on trial was too slow for",
            ["model"],
            registry=registry,
        )
        self.failed = Counter(
            "llm4ehr_shadow_failed",
            "Answers of the active model for which the one on trial gave no number",
            ["model"],
            registry=registry,
        )
        self.shares = Histogram(
            "llm4ehr_shadow_change_ratio",
            "Absolute difference of a probability in the newest hour; of phenotypes the largest",
            ["model", "task"],
            buckets=_SHARES,
            registry=registry,
        )
        self.hours = Histogram(
            "llm4ehr_shadow_change_hours",
            "Absolute difference of the remaining stay in the newest hour, in hours",
            ["model"],
            buckets=_HOURS,
            registry=registry,
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """`ShadowMetrics` of one version on trial, NAME/VERSION."""

    metrics: ShadowMetrics
    model: str

    def compared(self) -> None:
        self.metrics.compared.labels(self.model).inc()

    def dropped(self) -> None:
        self.metrics.dropped.labels(self.model).inc()

    def failed(self) -> None:
        self.metrics.failed.labels(self.model).inc()

    def changed(self, task: str, change: float) -> None:
        if task == "remaining_los":
            self.metrics.hours.labels(self.model).observe(change)
        else:
            self.metrics.shares.labels(self.model, task).observe(change)


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
    score: HourScore | None
    """None: the model gave no number."""


@dataclass(slots=True)
class Shadow:
    """One trial. Both models report what they scored; equal entries are compared."""

    counts: Counts
    compared: int = 0
    dropped: int = 0
    failed: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    _waiting: OrderedDict[str, _Waiting] = field(default_factory=OrderedDict)

    def active_scored(self, scored: Scored) -> None:
        """The active model has scores of a new entry."""
        self._said(scored.view, _newest(scored), of_active=True)

    def trial_scored(self, scored: Scored) -> None:
        """The model on trial has."""
        self._said(scored.view, _newest(scored), of_active=False)

    def trial_failed(self, view: EpisodeView) -> None:
        """The model on trial gave no number for an entry."""
        self._said(view, None, of_active=False)

    def _said(self, view: EpisodeView, score: HourScore | None, *, of_active: bool) -> None:
        seq = view.seq
        mine = _Waiting(seq, of_active, score)
        other = self._waiting.pop(view.episode_id, None)
        if other is None:
            self._keep(view.episode_id, mine)
        elif other.seq == seq and other.of_active != of_active:
            if mine.score is None or other.score is None:
                self.failed += 1
                self.counts.failed()
            else:
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
            self.counts.dropped()

    def _compare(self, a: HourScore, b: HourScore) -> None:
        self.compared += 1
        self.counts.compared()
        for task, change in _changes(a, b).items():
            self.changes.setdefault(task, Change()).add(change)
            self.counts.changed(task, change)


@dataclass(slots=True)
class Trial:
    """The version on trial, the one it is compared with, and what was found."""

    of: Version
    against: Name
    since: datetime
    shadow: Shadow
    until: datetime | None = None
    """None while it goes on."""


def _newest(scored: Scored) -> HourScore:
    return scored.scores.hours[scored.view.head_hour]


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
