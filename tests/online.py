"""The engine on tiny bundles, and the same answers worked out without it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from llm4ehr.bundle import Bundle, Network, save_bundle
from llm4ehr.calibration import Calibration, Interval, OutputMap, default_calibration
from llm4ehr.episode import Episode, event_tokens, featurise
from llm4ehr.variables import VARIABLE_INDEX
from service.core import EpisodeView, HourScore, HoursInterval, Numerics, Scores
from service.engine.backends.base import Backend, TickResult
from service.engine.backends.shapes import token_positions
from service.engine.backends.torch_cpu import TorchCpuBackend
from service.engine.engine import OnlineEngine
from service.engine.metrics import EngineMetrics
from service.engine.tokens import TokenRows
from service.models.version import Model

HEADS = {"decompensation": 1, "mortality": 1, "remaining_los": 1, "phenotyping": 2}
PHENOTYPES = ("sepsis", "shock")
# Of every kind. Shifted, for raw outputs lie around 0 and hours would often be cut off there.
KNOTS = ((-3.0, 0.02), (-0.2, 0.3), (0.1, 0.3), (3.0, 0.9))
CALIBRATION: Calibration = default_calibration(list(HEADS)) | {
    "decompensation": OutputMap(kind="platt_isotonic", a=0.9, a_hour=0.1, knots=KNOTS),
    "mortality": OutputMap(kind="platt", a=0.7, b=-1.0, a_hour=0.1, b_hour=-0.05, last_hour=20),
    "remaining_los": OutputMap(
        kind="log_days",
        a=0.5,
        b=2.0,
        interval=Interval(
            coverage=0.8, first_hours=(0, 12, 24), half_widths=(0.9, 0.7, 1.1), stays=(30, 31, 32)
        ),
    ),
    "phenotyping": OutputMap(kind="isotonic", a=1.1, knots=KNOTS),
}
LABELS = {"phenotypes": list(PHENOTYPES)}
ROWS = 16
"""Rows of a tick in all tests: on some machines another number gives another last bit."""

_T0 = datetime(2026, 3, 1, 8, tzinfo=UTC)


def tiny_bundle(
    make_network: Callable[..., Network], family: str = "gpt2", **options: Any
) -> Bundle:
    """A network with all four heads as a bundle; `make_network` is the fixture `tiny_network`."""
    network = make_network(family, heads=HEADS, **options)
    return Bundle(
        name="tiny",
        version=1,
        digest="ab" * 32,
        network=network,
        calibration=CALIBRATION,
        phenotypes=PHENOTYPES,
        labels=LABELS,
    )


def save_tiny(make_network: Callable[..., Network], repository: Path) -> None:
    """The same as a bundle on disk, `tiny/1`."""
    bundle = tiny_bundle(make_network)
    save_bundle(
        repository, bundle.name, bundle.version, bundle.network,
        calibration=bundle.calibration, labels=bundle.labels, metrics={}, card="# Tiny\n",
    )  # fmt: skip


# Units of the shared fixture's vocabulary, so that values reach the model as they are.
_EVENT_UNITS = {"LOINC/2160-0": "mg/dL", "LOINC/2524-7": "mmol/L"}


def view_of(episode: Episode, seq: int = 1) -> EpisodeView:
    """A view as the log would give it, with data in every hour up to the last."""
    return EpisodeView(
        episode_id=episode.episode_id,
        seq=seq,
        recorded_at=_T0,
        admitted_at=_T0,
        discharged_at=None,
        deleted=False,
        statics=episode.statics,
        episode=episode,
        event_units=tuple(_EVENT_UNITS.get(code) for code in episode.ev_code),
        event_pairs=frozenset((code, _EVENT_UNITS.get(code)) for code in episode.ev_code),
        head_hour=episode.n_hours - 1,
        newest_effective_at=None,
        counts={},
        ignored={},
        newest_us=np.zeros(200, np.int64),
        known_us=np.zeros(200, np.int64),
        touched_us=np.zeros(200, np.int64),
    )


def until(episode: Episode, n_hours: int) -> Episode:
    """What was known of a stay at the end of its first hours."""
    seen, happened = episode.obs_hours < n_hours, episode.ev_hours < n_hours
    return replace(
        episode,
        n_hours=n_hours,
        **{name: getattr(episode, name)[seen] for name in _OBSERVATIONS},
        **{name: getattr(episode, name)[happened] for name in _EVENTS},
    )


_OBSERVATIONS = ("obs_variable", "obs_hours", "obs_value", "obs_priority")
_EVENTS = ("ev_code", "ev_hours", "ev_value")


def with_items(
    episode: Episode,
    observations: Sequence[tuple[int, float, float | None]],
    events: Sequence[tuple[str, float, float | None]] = (),
) -> Episode:
    """The stay with more items: (variable or code, hours, value)."""
    of_variable, obs_hours, obs_value = (
        zip(*observations, strict=True) if observations else [()] * 3
    )
    of_code, ev_hours, ev_value = zip(*events, strict=True) if events else [()] * 3
    none = [np.nan if value is None else value for value in ev_value]
    return replace(
        episode,
        obs_variable=np.append(episode.obs_variable, np.array(of_variable, np.int16)),
        obs_hours=np.append(episode.obs_hours, obs_hours),
        obs_value=np.append(episode.obs_value, obs_value),
        obs_priority=np.append(episode.obs_priority, np.zeros(len(observations), np.int8)),
        ev_code=np.append(episode.ev_code, np.array(of_code, object)),
        ev_hours=np.append(episode.ev_hours, ev_hours),
        ev_value=np.append(episode.ev_value, none),
    )


def with_value(episode: Episode, hour: int, value: float) -> Episode:
    """The stay with one more heart rate in the last minutes of an hour."""
    return with_items(episode, [(VARIABLE_INDEX["hr"], hour + 0.99, value)])


@dataclass(frozen=True, eq=False)
class Answers:
    """What must come out."""

    hours: tuple[HourScore, ...]
    embeddings: NDArray[np.float32]


class Replica:
    """Answers without engine, scheduler or neighbours: one hour after the other in one slot."""

    def __init__(self, bundle: Bundle, rows: int = ROWS) -> None:
        self._bundle = bundle
        self._backend = TorchCpuBackend(bundle.network, n_slots=1, max_rows=rows)

    def __call__(self, episode: Episode, n_hours: int | None = None) -> Answers:
        network, calibration = self._bundle.network, self._bundle.calibration
        n = episode.n_hours if n_hours is None else n_hours
        features = featurise(episode, network.vocabulary, network.preprocessing, n)
        latest = self._latest(episode, len(features.series))
        hours, embeddings = [], np.zeros((0, network.model.state_size), np.float32)
        for hour in range(len(features.series)):
            rows = slice(hour, hour + 1)
            beside = None if latest is None else latest[rows]
            result = self._backend.tick(
                features.series[rows], features.events[rows], [0], [hour], beside
            )
            at = np.array([hour])
            said = {t: calibration[t](raw, at)[0].tolist() for t, raw in result.raw.items()}
            los = calibration["remaining_los"]
            low, high = los.bounds(result.raw["remaining_los"], at)
            interval = HoursInterval(
                low=low[0, 0].item(), high=high[0, 0].item(), coverage=los.interval.coverage
            )
            hours.append(
                HourScore(
                    hour=hour,
                    decompensation=said["decompensation"][0],
                    mortality=said["mortality"][0],
                    remaining_los_hours=said["remaining_los"][0],
                    remaining_los_interval_hours=interval,
                    phenotypes=dict(zip(PHENOTYPES, said["phenotyping"], strict=True)),
                    imputed_share=float(1.0 - features.observed[hour].mean()),
                )
            )
            embeddings = np.append(embeddings, result.hidden, axis=0)
        return Answers(tuple(hours), embeddings)

    def _latest(self, episode: Episode, n_hours: int) -> NDArray[np.float32] | None:
        """State of the last token of each hour, one token after the other; None without stream."""
        network = self._bundle.network
        if not (window := token_positions(network)):
            return None
        rows = TokenRows(window)
        tokens = event_tokens(episode, network.vocabulary, n_hours, network.preprocessing)
        latest = np.zeros((n_hours, network.model.backbone.hidden_size), np.float32)
        for row in range(rows.n_rows(len(tokens.ids))):
            token = rows.token(row)
            z = self._backend.tick_tokens(tokens.ids[[token]].astype(np.int64), [0], [row % window])
            if rows.counts(row):
                latest[tokens.hours[token] :] = z
        return latest


def assert_same_bits(scores: Scores | Answers, expected: Scores | Answers) -> None:
    """All answers and hidden states are equal, to the last bit."""
    assert scores.hours == expected.hours
    assert scores.embeddings.dtype == expected.embeddings.dtype == np.float32
    assert scores.embeddings.shape == expected.embeddings.shape
    assert scores.embeddings.tobytes() == expected.embeddings.tobytes()


class Gate:
    """A backend that computes only while it is open, and remembers the rows it was given."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.ticks: list[list[tuple[int, int]]] = []
        """(slot, hour) of every row."""
        self.token_ticks: list[list[tuple[int, int]]] = []
        """(slot, position) of every row of the event pass."""
        self.fault: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def n_rows(self) -> int:
        return sum(map(len, self.ticks))

    def _enter(self) -> None:
        self.entered.set()
        assert self.open.wait(60)
        if self.fault is not None:
            raise self.fault

    def tick(
        self,
        series: NDArray[np.float32],
        events: NDArray[np.float32],
        slots: Sequence[int],
        hours: Sequence[int],
        latest: NDArray[np.float32] | None = None,
    ) -> TickResult:
        self._enter()
        self.ticks.append(list(zip(slots, hours, strict=True)))
        return self._backend.tick(series, events, slots, hours, latest)

    def tick_tokens(
        self, ids: NDArray[np.int64], slots: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        self._enter()
        self.token_ticks.append(list(zip(slots, positions, strict=True)))
        return self._backend.tick_tokens(ids, slots, positions)


NUMERICS = Numerics(precision="fp32", backend="torch-cpu", rows=ROWS, threads=1, kernel=None)


def engine_of(
    bundle: Bundle,
    *,
    n_slots: int = 4,
    max_pending: int = 1000,
    registry: CollectorRegistry | None = None,
    backend: Backend | None = None,
    **options: Any,
) -> OnlineEngine:
    """An engine that was not started."""
    backend = backend or TorchCpuBackend(bundle.network, n_slots=n_slots, max_rows=ROWS)
    metrics = EngineMetrics(registry or CollectorRegistry())
    options = {"numerics": NUMERICS, "max_pending": max_pending} | options
    return OnlineEngine(bundle, backend, metrics, **options)


def model_of(bundle: Bundle, engine: OnlineEngine) -> Model:
    """An engine as the service takes it; the test starts and closes it."""
    return Model(engine=engine, vocabulary=bundle.network.vocabulary, status=engine.status)


@asynccontextmanager
async def engine_on(bundle: Bundle, **options: Any) -> AsyncIterator[OnlineEngine]:
    """An engine that runs."""
    engine = engine_of(bundle, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
