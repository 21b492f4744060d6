"""From raw head outputs to what is reported: probabilities, and hours with an interval.

Every map is non-decreasing in the raw output, works hour by hour in float64, and gives the same
bits whatever other hours are mapped with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import MAX_HOURS
from llm4ehr.model import Task

MAX_KNOTS = 50

ProbabilityKind = Literal["platt", "isotonic", "platt_isotonic"]
HoursKind = Literal["log_days", "days"]
_PROBABILITY_KINDS = ("platt", "isotonic", "platt_isotonic")
_HOURS_KINDS = ("log_days", "days")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """How far a raw output may be off: split conformal prediction, by hour of stay (Mondrian).

    Bin i begins with hour `first_hours[i]` and ends before the next one; an answer x of it stands
    for x - half_widths[i] to x + half_widths[i], on the scale of the raw output. For a new stay
    and hour that are exchangeable with the `stays[i]` ones it was fitted on, the interval holds the
    truth with a probability of at least `coverage`.
    """

    coverage: float
    first_hours: tuple[int, ...]
    half_widths: tuple[float, ...]
    stays: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage {self.coverage!r} is not between 0 and 1")
        if not len(self.first_hours) == len(self.half_widths) == len(self.stays) > 0:
            raise ValueError("an interval needs a first hour, a width and a number for every bin")
        if self.first_hours[0] != 0 or not _increasing(self.first_hours):
            raise ValueError("first hours of an interval must rise from 0")
        if not all(math.isfinite(width) and width >= 0 for width in self.half_widths):
            raise ValueError("half widths of an interval must be finite and not negative")
        for width, n in zip(self.half_widths, self.stays, strict=True):
            if conformal_rank(n, self.coverage) is None:
                raise ValueError(f"{n} stays cannot give the half width {width!r}")

    def half_width(self, hours: NDArray[np.integer]) -> NDArray[np.float64]:
        """Half widths [T] at hours [T]."""
        bins = np.searchsorted(np.array(self.first_hours), hours, side="right") - 1
        return np.array(self.half_widths, np.float64)[bins]


def conformal_rank(n: int, coverage: float) -> int | None:
    """Which of n sorted scores, from 1, covers a new one: ceil((n + 1) coverage). None: no one."""
    rank = math.ceil((n + 1) * coverage - 1e-9)
    return rank if rank <= n else None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMap:
    """How the raw output x of one head at one hour becomes an answer.

    z = (a + a_hour u) x + (b + b_hour u) with u = log(1 + min(hour, last_hour)), and then

    "platt": probability sigmoid(z) (Platt scaling; b = 0 is temperature scaling).
    "isotonic": probability by lines through the `knots` (z, probability), level outside.
    "platt_isotonic": the mean of the two.
    "log_days": 24 (exp(z) - 1) hours; "days": 24 z hours; at least 0.

    Raises ValueError for parameters with which an answer could fall when the raw output rises, or
    be no probability.
    """

    kind: ProbabilityKind | HoursKind
    a: float = 1.0
    b: float = 0.0
    a_hour: float = 0.0
    b_hour: float = 0.0
    last_hour: int = MAX_HOURS - 1
    knots: tuple[tuple[float, float], ...] = ()
    interval: Interval | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*_PROBABILITY_KINDS, *_HOURS_KINDS):
            raise ValueError(f"unknown kind of calibration {self.kind!r}")
        if not all(math.isfinite(v) for v in (self.a, self.b, self.a_hour, self.b_hour)):
            raise ValueError("the line of a calibration must be finite")
        if self.last_hour < 0:
            raise ValueError(f"last hour {self.last_hour!r} of a calibration is before the stay")
        if min(self.a, self.a + self.a_hour * math.log1p(self.last_hour)) <= 0:
            raise ValueError("the line of a calibration must rise at every hour")
        if ("isotonic" in self.kind) != bool(self.knots):
            raise ValueError(f"a calibration of kind {self.kind!r} with {len(self.knots)} knots")
        if self.knots:
            _check_knots(self.knots)
        if self.interval is not None and self.kind not in _HOURS_KINDS:
            raise ValueError("only a remaining stay has an interval")

    def __call__(
        self, raw: NDArray[np.floating], hours: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Answers [..., T, n] to raw outputs [..., T, n] at hours [T] since admission."""
        z = self.line(raw, hours)
        if self.kind == "platt":
            return _sigmoid(z)
        if self.kind == "isotonic":
            return self._through_knots(z)
        if self.kind == "platt_isotonic":
            return (_sigmoid(z) + self._through_knots(z)) / 2
        days = np.expm1(np.minimum(z, 10.0)) if self.kind == "log_days" else z
        hours_left: NDArray[np.float64] = np.maximum(24.0 * days, 0.0)
        return hours_left

    def line(self, raw: NDArray[np.floating], hours: NDArray[np.integer]) -> NDArray[np.float64]:
        """z [..., T, n] of raw outputs [..., T, n] at hours [T]."""
        u = np.log1p(np.minimum(hours, self.last_hour).astype(np.float64))[..., None]
        slope, level = self.a + self.a_hour * u, self.b + self.b_hour * u
        z: NDArray[np.float64] = slope * np.asarray(raw, dtype=np.float64) + level
        return z

    def bounds(
        self, raw: NDArray[np.floating], hours: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper end [..., T, n] of the interval of every answer.

        Raises ValueError where the map has no interval.
        """
        if self.interval is None:
            raise ValueError("this calibration has no interval")
        x, half = np.asarray(raw, np.float64), self.interval.half_width(hours)[..., None]
        return self(x - half, hours), self(x + half, hours)

    def _through_knots(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        x, p = np.array(self.knots, np.float64).T
        # Rounding could lift the end of a piece above the knot where the next one begins.
        following = np.minimum(np.searchsorted(x, z, side="right"), len(x) - 1)
        between: NDArray[np.float64] = np.minimum(np.interp(z, x, p), p[following])
        return between

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> OutputMap:
        """Raises ValueError, TypeError or KeyError on anything that `to_json` cannot have made."""
        fields = dict(body)
        interval = fields.pop("interval", None)
        if interval is not None:
            made: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in interval.items()
            }
            interval = Interval(**made)
        knots = tuple((float(z), float(p)) for z, p in fields.pop("knots", ()))
        return cls(**fields, knots=knots, interval=interval)


Calibration = dict[Task, OutputMap]


def default_calibration(tasks: Sequence[Task], los_scale: HoursKind = "log_days") -> Calibration:
    """Uncalibrated: plain sigmoid, and remaining stay on the scale it is trained on."""
    return {t: OutputMap(kind=los_scale if t == "remaining_los" else "platt") for t in tasks}


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """Plain data that `calibration_from_json` reads."""
    return {task: of.to_json() for task, of in calibration.items()}


def calibration_from_json(body: Mapping[Task, Any]) -> Calibration:
    """Raises ValueError, TypeError or KeyError on anything else than maps of heads."""
    return {task: OutputMap.from_json(of) for task, of in body.items()}


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-np.clip(z, -700.0, 700.0)))


def _check_knots(knots: tuple[tuple[float, float], ...]) -> None:
    if len(knots) > MAX_KNOTS:
        raise ValueError(f"{len(knots)} knots of a calibration are more than {MAX_KNOTS}")
    z, p = zip(*knots, strict=True)
    if not all(map(math.isfinite, z)) or not _increasing(z):
        raise ValueError("the knots of a calibration must be finite and rise")
    if not all(0 < value < 1 for value in p) or any(b < a for a, b in pairwise(p)):
        raise ValueError("probabilities at the knots must lie between 0 and 1 and never fall")


def _increasing(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))
