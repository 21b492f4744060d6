"""The nouns of the service: what is logged, what is known of an episode, and who scores it.

No torch, no web framework, no clock: whoever needs the time passes it in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from service.entries import Draft, Entry, Kind, content_id, entries_as_of, from_us, to_us
from service.projection import EpisodeView, HourStatus, episode_at, hour_status

__all__ = [
    "AnswerLayout",
    "BundleInfo",
    "Draft",
    "Engine",
    "EngineStatus",
    "EngineStopped",
    "Entry",
    "EpisodeView",
    "HourScore",
    "HourScores",
    "HourStatus",
    "HoursInterval",
    "Kind",
    "ModelFault",
    "Numerics",
    "Overloaded",
    "Scores",
    "content_id",
    "entries_as_of",
    "episode_at",
    "from_us",
    "hour_status",
    "to_us",
]


class Overloaded(Exception):
    """The engine has more work waiting than it may hold. Nothing is lost; ask again later."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("the engine is overloaded")
        self.retry_after_s = retry_after_s


class EngineStopped(Exception):
    """The engine ended before it could answer; the log has everything."""


class ModelFault(Exception):
    """The model gave a number that is not finite for this episode: there is no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoursInterval:
    """Low and high end in hours, and how many of such intervals hold the truth (0..1)."""

    low: float
    high: float
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HourScore:
    """What the model says at the end of one hour. None where the bundle lacks the task."""

    hour: int
    decompensation: float | None
    mortality: float | None
    remaining_los_hours: float | None
    remaining_los_interval_hours: HoursInterval | None
    phenotypes: dict[str, float]
    imputed_share: float
    """Share of the variables not measured in this hour but carried forward or assumed, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLayout:
    """Which answers a bundle gives, and in which column of `HourScores` each stands."""

    tasks: frozenset[str]
    phenotypes: tuple[str, ...]
    coverage: float | None
    """Of the interval of the remaining stay; None if there is none."""

    @property
    def width(self) -> int:
        """Columns: imputed share, decompensation, mortality, remaining stay with the two ends of
        its interval, phenotypes. What the bundle does not give is 0 there.
        """
        return 6 + len(self.phenotypes)


class HourScores(Sequence[HourScore]):
    """Scores of hours 0..n-1 in an array [n, width] of a layout, which takes a sixth of the memory
    that as many objects would. An hour is made an object when it is looked at.
    """

    __slots__ = ("_layout", "_values")

    def __init__(self, layout: AnswerLayout, values: NDArray[np.float64]) -> None:
        self._layout = layout
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> HourScore: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[HourScore, ...]: ...

    def __getitem__(self, index: int | slice) -> HourScore | tuple[HourScore, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        hour = range(len(self))[index]
        layout = self._layout
        share, decompensation, mortality, los, low, high, *phenotypes = self._values[hour].tolist()
        interval = None
        if layout.coverage is not None:
            interval = HoursInterval(low=low, high=high, coverage=layout.coverage)
        return HourScore(
            hour=hour,
            decompensation=decompensation if "decompensation" in layout.tasks else None,
            mortality=mortality if "mortality" in layout.tasks else None,
            remaining_los_hours=los if "remaining_los" in layout.tasks else None,
            remaining_los_interval_hours=interval,
            phenotypes=dict(zip(layout.phenotypes, phenotypes, strict=True)),
            imputed_share=share,
        )

    def __eq__(self, other: object) -> bool:
        """Whether all answers are the same, between two of these to the last bit."""
        if isinstance(other, HourScores) and self._layout == other._layout:
            same_shape = self._values.shape == other._values.shape
            return same_shape and self._values.tobytes() == other._values.tobytes()
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Scores of hours 0..n-1, computed from exactly the log entries 1..seq."""

    seq: int
    hours: Sequence[HourScore]
    embeddings: NDArray[np.float32]  # [n, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How the numbers of a model are computed: their last bits are equal where all of it is, with
    the same packages on the same kind of processor.
    """

    precision: str
    backend: str
    rows: int
    """Of the largest tick."""
    threads: int
    kernel: str | None
    """What attends in `torch-cpu`: "compiled" or "reference"."""
    gate: Mapping[str, Any] | None = None
    """What a reduced precision was measured to change, as JSON; None for full precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleInfo:
    """Which model answers."""

    name: str
    version: str
    digest: str
    preprocessing_digest: str
    tasks: tuple[str, ...]
    phenotypes: tuple[str, ...]
    causal: bool
    numerics: Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Figures of an engine at one moment."""

    backend: str
    tick_sizes: tuple[int, ...]
    slots_used: int
    slots_free: int
    slots_lost: int
    """Slots given back for want of memory."""
    stays: int
    """Stays of which something is held."""
    pending_stays: int
    """Requests that wait for scores."""


class Engine(Protocol):
    """Turns an episode into scores. Every method is called on the event loop."""

    @property
    def bundle(self) -> BundleInfo: ...

    def submit(
        self, view: EpisodeView, n_hours: int | None = None, *, background: bool = False
    ) -> asyncio.Future[Scores]:
        """Score hours 0..max(head_hour + 1, n_hours) - 1 in the episode's live slot.

        With `background` nobody waits for it, and a rebuild goes behind those of others. Only the
        newest view of an episode is computed: futures of older ones resolve with a newer
        `seq` or are cancelled. Raises Overloaded, EngineStopped; the future may fail with
        EngineStopped or ModelFault.
        """
        ...

    def submit_as_of(self, view: EpisodeView, n_hours: int | None = None) -> asyncio.Future[Scores]:
        """The same for a past view, without touching the live slot. Raises Overloaded."""
        ...

    def forget(self, episode_id: str) -> None:
        """Drop whatever is held for an episode."""
        ...

    def alive(self) -> bool:
        """Whether it was started and works, whatever its load. False for good once it has died."""
        ...

    def idle(self) -> bool:
        """Whether nobody waits for scores."""
        ...
