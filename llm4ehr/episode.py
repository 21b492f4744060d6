"""From the observations and events of one ICU stay to model input. The only preprocessing there is.

Training, streaming and batch scoring call `featurise`; nothing else turns clinical data into
numbers for the model. Everything here is a pure function of its arguments and indifferent to the
order in which items are given: ties are broken by content, never by position.

Hours are float hours since ICU admission. An item stands at the later of its effective and its
available time, so that hour t never contains what was not known by its end.

Shape legend: T hours, S series features, C vocabulary codes, N tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from llm4ehr.vocabulary import Vocabulary

MAX_HOURS = 200
N_VARIABLES = len(VARIABLES)
EVENT_CHANNELS = 3  # value, seen in this hour, recency
PREPROCESSING_VERSION = 1

Sex = Literal["female", "male"]
UnitType = Literal["coronary", "cardiac_surgery", "medical", "surgical", "other"]
SEXES: tuple[Sex, ...] = ("female", "male")
UNIT_TYPES: tuple[UnitType, ...] = ("coronary", "cardiac_surgery", "medical", "surgical", "other")

# Centre and spread of the static facts. Fixed by definition rather than fitted: they only bring
# adult values to the order of one, and a fitted constant would be one more thing to version.
_STATIC_SCALE = {"age_years": (60.0, 20.0), "height_cm": (170.0, 12.0), "weight_kg": (80.0, 25.0)}
STATIC_FEATURES = 2 * len(_STATIC_SCALE) + len(SEXES) + len(UNIT_TYPES)

# The recency channel halves roughly every eight hours: labs older than two days hardly differ.
_RECENCY_HOURS = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statics:
    """Facts known at admission. All optional; the model sees which ones are missing."""

    age_years: float | None = None
    sex: Sex | None = None
    unit_type: UnitType | None = None
    height_cm: float | None = None
    weight_kg: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """One ICU stay as parallel arrays, in any order.

    `obs_variable` indexes `VARIABLES`; values are in canonical units. `obs_priority` 0 is preferred
    over 1 within an hour (an arterial line over a cuff). `ev_value` is NaN where an event has none.
    `n_hours` is the length of the record in hours and may exceed what the model reads.
    """

    episode_id: str
    n_hours: int
    obs_variable: NDArray[np.int16]  # [n]
    obs_hours: NDArray[np.float64]  # [n]
    obs_value: NDArray[np.float64]  # [n]
    obs_priority: NDArray[np.int8]  # [n]
    ev_code: NDArray[np.object_]  # [m] canonical code strings
    ev_hours: NDArray[np.float64]  # [m]
    ev_value: NDArray[np.float64]  # [m]
    statics: Statics = field(default_factory=Statics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """All choices that turn an episode into model input; saved in the bundle and hashed.

    `bin_edge` (M22): "left" puts time t into [t, t+1), "right" into (t-1, t] as the MIMIC-III
    benchmark does. `imputation` (M12): "causal" carries the last value forward and starts from the
    variable's normal value; "linear" is the paper's interpolation, which reads later observations
    and therefore cannot be streamed. `dedupe` (M19) thins repeated codes before tokenising.
    `mean` and `std` normalise the variables and come from the training split.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    imputation: Literal["causal", "linear"] = "causal"
    bin_edge: Literal["left", "right"] = "left"
    dedupe: Literal["hour", "episode_last", "none"] = "hour"
    observed_inputs: bool = True  # observed-mask and hours-since-observed beside the values
    static_inputs: bool = True
    clip: float = 8.0  # bound on normalised values, against artefacts inside the limits
    max_hours: int = MAX_HOURS

    def __post_init__(self) -> None:
        if len(self.mean) != N_VARIABLES or len(self.std) != N_VARIABLES:
            raise ValueError(f"mean and std need {N_VARIABLES} entries, one for each variable")
        if not all(s > 0 for s in self.std):
            raise ValueError("every std must be positive")

    @property
    def n_series(self) -> int:
        """Width S of the series features."""
        per_variable = 3 if self.observed_inputs else 1
        return N_VARIABLES * per_variable + (STATIC_FEATURES if self.static_inputs else 0)

    @property
    def causal(self) -> bool:
        """Whether hour t depends only on what was known by its end."""
        return self.imputation == "causal"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, with the variable table it was made for."""
        body = asdict(self) | {"mean": list(self.mean), "std": list(self.std)}
        variables = [{"name": v.name, "unit": v.unit, "normal": v.normal} for v in VARIABLES]
        return {"version": PREPROCESSING_VERSION, "variables": variables, **body}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_json`. Raises ValueError if it was made by another version or table."""
        body = dict(body)
        if (version := body.pop("version", None)) != PREPROCESSING_VERSION:
            raise ValueError(f"preprocessing version {version!r}, expected {PREPROCESSING_VERSION}")
        variables = body.pop("variables")
        ours = [{"name": v.name, "unit": v.unit, "normal": v.normal} for v in VARIABLES]
        if variables != ours:
            raise ValueError("preprocessing was made for another table of variables")
        return cls(**body | {"mean": tuple(body["mean"]), "std": tuple(body["std"])})


def preprocessing_digest(preprocessing: Preprocessing, vocabulary: Vocabulary) -> str:
    """SHA-256 over everything that decides how an episode becomes numbers."""
    body = json.dumps([preprocessing.to_json(), vocabulary.to_json()], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Hourly values in canonical units, whether observed, and hours since last observed.

    `hours_since` counts whole hours, 0 in an hour with an observation and `max_hours` before the
    first one.
    """

    values: NDArray[np.float64]  # [T, 11]
    observed: NDArray[np.bool_]  # [T, 11]
    hours_since: NDArray[np.float64]  # [T, 11]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """Model input of one episode. Row t of `series` and `events` belongs to hour t."""

    series: NDArray[np.float32]  # [T, S]
    events: NDArray[np.float32]  # [T, 3 C], code-major: value, seen, recency
    observed: NDArray[np.bool_]  # [T, 11]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventTokens:
    """The event sequence of one episode for the EHR pass, in time order."""

    ids: NDArray[np.int32]  # [N] rows of the clinical token table
    hours: NDArray[np.int16]  # [N] hour bin of the token


def hour_of(
    hours: NDArray[np.float64] | float, bin_edge: Literal["left", "right"] = "left"
) -> NDArray[np.int64]:
    """Hour bin of a time. The one place that decides on which side of an hour its border lies."""
    hours = np.asarray(hours, dtype=np.float64)
    if bin_edge == "left":
        return np.floor(hours).astype(np.int64)
    # Admission itself belongs to the first hour.
    return np.where(hours == 0, 0, np.ceil(hours) - 1).astype(np.int64)


def _latest_by_cell(
    cell: NDArray[np.int64],
    priority: NDArray[np.int8],
    hours: NDArray[np.float64],
    value: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """One value a cell: best priority, then latest; equal times give their median.

    Returns the cells in rising order, the time and the value of each.
    """
    if cell.size == 0:
        return cell, hours, value
    order = np.lexsort((value, hours, -priority.astype(np.int64), cell))
    cell, priority, hours, value = cell[order], priority[order], hours[order], value[order]
    last = np.flatnonzero(np.append(cell[1:] != cell[:-1], True))
    new_tie = np.ones(cell.size, dtype=bool)
    new_tie[1:] = (
        (cell[1:] != cell[:-1]) | (priority[1:] != priority[:-1]) | (hours[1:] != hours[:-1])
    )
    tie_start = np.maximum.accumulate(np.where(new_tie, np.arange(cell.size), 0))[last]
    size = last - tie_start + 1
    median = (value[tie_start + (size - 1) // 2] + value[tie_start + size // 2]) / 2
    return cell[last], hours[last], median


def hourly_grid(
    episode: Episode,
    n_hours: int,
    imputation: Literal["causal", "linear"] = "causal",
    bin_edge: Literal["left", "right"] = "left",
    max_hours: int = MAX_HOURS,
) -> Grid:
    """Bin, thin and impute the observations of the first `n_hours` hours.

    Items before admission or after the last hour are left out.
    """
    hour = hour_of(episode.obs_hours, bin_edge)
    inside = (hour >= 0) & (hour < n_hours)
    cell, hours, value = _latest_by_cell(
        episode.obs_variable[inside].astype(np.int64) * n_hours + hour[inside],
        episode.obs_priority[inside],
        episode.obs_hours[inside],
        episode.obs_value[inside],
    )
    raw = np.full((N_VARIABLES, n_hours), np.nan)
    raw.flat[cell] = value
    observed = ~np.isnan(raw)
    steps = np.arange(n_hours)
    last_seen = np.maximum.accumulate(np.where(observed, steps, -1), axis=1)
    normal = np.array([v.normal for v in VARIABLES])[:, None]
    filled = np.take_along_axis(raw, np.maximum(last_seen, 0), axis=1) if n_hours else raw
    values = np.where(last_seen >= 0, filled, normal)
    if imputation == "linear":
        variable = cell // max(n_hours, 1)
        for v in np.unique(variable):
            points = variable == v
            minutes = (np.arange(n_hours * 60) + 0.5) / 60
            line = np.interp(minutes, hours[points], value[points])
            values[v] = line.reshape(n_hours, 60).mean(axis=1)
    hours_since = np.where(last_seen >= 0, steps - last_seen, max_hours).astype(np.float64)
    return Grid(values=values.T, observed=observed.T, hours_since=hours_since.T)


def static_features(statics: Statics) -> NDArray[np.float32]:
    """Static facts as one row: scaled value and known-flag each, then one-hot sex and unit type."""
    row: list[float] = []
    for name, (centre, spread) in _STATIC_SCALE.items():
        value = getattr(statics, name)
        row += [0.0, 0.0] if value is None else [(value - centre) / spread, 1.0]
    row += [float(statics.sex == s) for s in SEXES]
    row += [float(statics.unit_type == u) for u in UNIT_TYPES]
    return np.array(row, dtype=np.float32)


def _known_events(
    episode: Episode, vocabulary: Vocabulary, n_hours: int, bin_edge: Literal["left", "right"]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Code index, hour bin, time and value of the events that the model knows."""
    code = vocabulary.indices(episode.ev_code)
    hour = hour_of(episode.ev_hours, bin_edge)
    keep = (code >= 0) & (hour >= 0) & (hour < n_hours)
    return code[keep], hour[keep], episode.ev_hours[keep], episode.ev_value[keep]


def event_channels(
    episode: Episode,
    vocabulary: Vocabulary,
    n_hours: int,
    bin_edge: Literal["left", "right"] = "left",
) -> NDArray[np.float32]:
    """What is known of every code at every hour: last value (normalised), seen now, recency.

    Returns [T, 3 C]. All three are 0 before the first event of a code.
    """
    n_codes = len(vocabulary)
    out = np.zeros((n_codes, n_hours, EVENT_CHANNELS), dtype=np.float32)
    code, hour, hours, value = _known_events(episode, vocabulary, n_hours, bin_edge)
    if code.size:
        seen = np.zeros((n_codes, n_hours), dtype=bool)
        seen[code, hour] = True
        steps = np.arange(n_hours)
        last_seen = np.maximum.accumulate(np.where(seen, steps, -1), axis=1)
        recency = np.exp((last_seen - steps) / _RECENCY_HOURS)
        out[..., 1] = seen
        out[..., 2] = np.where(last_seen >= 0, recency, 0.0)

        valued = ~np.isnan(value)
        cell, _, latest = _latest_by_cell(
            code[valued] * n_hours + hour[valued],
            np.zeros(int(valued.sum()), dtype=np.int8),
            hours[valued],
            value[valued],
        )
        raw = np.zeros((n_codes, n_hours))
        raw.flat[cell] = vocabulary.normalise(cell // n_hours, latest)
        has_value = np.zeros((n_codes, n_hours), dtype=bool)
        has_value.flat[cell] = True
        last_valued = np.maximum.accumulate(np.where(has_value, steps, -1), axis=1)
        carried = np.take_along_axis(raw, np.maximum(last_valued, 0), axis=1)
        out[..., 0] = np.where(last_valued >= 0, carried, 0.0)
    return out.transpose(1, 0, 2).reshape(n_hours, n_codes * EVENT_CHANNELS)


def event_tokens(
    episode: Episode, vocabulary: Vocabulary, n_hours: int, preprocessing: Preprocessing
) -> EventTokens:
    """Code tokens, each followed by its decile token where it has one, in time order.

    Simultaneous events are ordered by code, then value, so that the sequence is a function of the
    set of events alone.
    """
    code, hour, hours, value = _known_events(episode, vocabulary, n_hours, preprocessing.bin_edge)
    order = np.lexsort((value, code, hours))
    code, hour, hours, value = code[order], hour[order], hours[order], value[order]
    if preprocessing.dedupe != "none" and code.size:
        key = code * n_hours + hour if preprocessing.dedupe == "hour" else code
        # The first occurrence in the reversed sequence is the last one in time.
        _, from_end = np.unique(key[::-1], return_index=True)
        keep = np.sort(code.size - 1 - from_end)
        code, hour, value = code[keep], hour[keep], value[keep]
    decile = vocabulary.decile_tokens(code, value)
    pair = np.stack([vocabulary.code_tokens(code), decile], axis=1).reshape(-1)
    present = pair >= 0
    return EventTokens(
        ids=pair[present].astype(np.int32), hours=np.repeat(hour, 2)[present].astype(np.int16)
    )


def featurise(
    episode: Episode, vocabulary: Vocabulary, preprocessing: Preprocessing, n_hours: int
) -> Features:
    """Model input for hours 0..n_hours-1 (at most `preprocessing.max_hours`).

    With causal imputation row t depends on nothing after hour t, so features of a longer prefix
    begin with those of a shorter one, bit for bit.
    """
    n_hours = min(n_hours, preprocessing.max_hours)
    grid = hourly_grid(
        episode, n_hours, preprocessing.imputation, preprocessing.bin_edge, preprocessing.max_hours
    )
    scaled = (grid.values - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    parts = [np.clip(scaled, -preprocessing.clip, preprocessing.clip)]
    if preprocessing.observed_inputs:
        age = np.log1p(grid.hours_since) / np.log1p(preprocessing.max_hours)
        parts += [grid.observed.astype(np.float64), age]
    if preprocessing.static_inputs:
        parts.append(np.tile(static_features(episode.statics), (n_hours, 1)))
    return Features(
        series=np.concatenate(parts, axis=1).astype(np.float32),
        events=event_channels(episode, vocabulary, n_hours, preprocessing.bin_edge),
        observed=grid.observed,
    )


def empty_episode(episode_id: str, n_hours: int = 0, statics: Statics | None = None) -> Episode:
    """A stay without a single item."""
    return Episode(
        episode_id=episode_id,
        n_hours=n_hours,
        obs_variable=np.empty(0, np.int16),
        obs_hours=np.empty(0),
        obs_value=np.empty(0),
        obs_priority=np.empty(0, np.int8),
        ev_code=np.empty(0, object),
        ev_hours=np.empty(0),
        ev_value=np.empty(0),
        statics=statics or Statics(),
    )


def variable_indices(names: NDArray[np.object_] | list[str]) -> NDArray[np.int16]:
    """Column numbers of variable names. Raises KeyError for an unknown name."""
    return np.array([VARIABLE_INDEX[name] for name in names], dtype=np.int16)
