"""From the observations and events of one ICU stay to model input. The only preprocessing there is.

Training, streaming and batch scoring call `featurise`; nothing else turns clinical data into
numbers for the model. Everything here is a pure function of its arguments and indifferent to the
order in which items are given: ties are broken by content, never by position.

Hours are float hours since ICU admission. An item stands at the later of its effective and its
available time, so that hour t never contains what was not known by its end.

Shape legend: T hours, S series features, C vocabulary codes, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.hourly import BinEdge, hour_of, last_cells, latest_by_cell, running_max
from llm4ehr.preprocessing import (
    MAX_HOURS,
    N_VARIABLES,
    SEXES,
    STATIC_FEATURES,
    UNIT_TYPES,
    Preprocessing,
    Sex,
    Statics,
    UnitType,
    preprocessing_digest,
    static_features,
)
from llm4ehr.variables import VARIABLE_INDEX, VARIABLES
from llm4ehr.vocabulary import Vocabulary

__all__ = [
    "EVENT_CHANNELS", "MAX_HOURS", "N_VARIABLES", "SEXES", "STATIC_FEATURES", "UNIT_TYPES",
    "Episode", "EventTokens", "Features", "Grid", "Preprocessing", "Sex", "Statics", "UnitType",
    "empty_episode", "event_channels", "event_tokens", "featurise", "first_difference", "hour_of",
    "hourly_grid", "preprocessing_digest", "static_features", "variable_indices",
]  # fmt: skip

EVENT_CHANNELS = 3  # value, seen in this hour, recency
_NORMAL = np.array([v.normal for v in VARIABLES])

# The recency channel halves roughly every eight hours: labs older than two days hardly differ.
_RECENCY_HOURS = 12.0


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


def hourly_grid(
    episode: Episode,
    n_hours: int,
    imputation: Literal["causal", "linear"] = "causal",
    bin_edge: BinEdge = "left",
    max_hours: int = MAX_HOURS,
    first: int = 0,
) -> Grid:
    """Bin, thin and impute the observations of hours `first` to `n_hours` - 1, which are the rows.

    Items of other hours are left out, as if they had never been.
    """
    n_rows = n_hours - first
    hour = hour_of(episode.obs_hours, bin_edge) - first
    inside = np.flatnonzero((hour >= 0) & (hour < n_rows))
    cell, hours, value = latest_by_cell(
        episode.obs_variable[inside].astype(np.int64) * n_rows + hour[inside],
        episode.obs_priority[inside],
        episode.obs_hours[inside],
        episode.obs_value[inside],
    )
    variable, row = np.divmod(cell, max(n_rows, 1))
    place = last_cells(row, variable, n_rows, N_VARIABLES)
    values = np.concatenate([_NORMAL, value])[place]
    last_row = np.concatenate([np.full(N_VARIABLES, -1), row])[place]
    if imputation == "linear":
        for v in np.unique(variable):
            points = variable == v
            minutes = first + (np.arange(n_rows * 60) + 0.5) / 60
            line = np.interp(minutes, hours[points], value[points])
            values[:, v] = line.reshape(n_rows, 60).mean(axis=1)
    steps = np.arange(n_rows)[:, None]
    hours_since = np.where(last_row >= 0, steps - last_row, max_hours).astype(np.float64)
    return Grid(values=values, observed=last_row == steps, hours_since=hours_since)


def _known_events(
    episode: Episode, vocabulary: Vocabulary, n_hours: int, bin_edge: BinEdge, first: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Code index, hour bin, time and value of the events of those hours that the model knows."""
    hour = hour_of(episode.ev_hours, bin_edge)
    inside = np.flatnonzero((hour >= first) & (hour < n_hours))
    code = vocabulary.indices(episode.ev_code[inside].tolist())
    inside, code = inside[code >= 0], code[code >= 0]
    return code, hour[inside], episode.ev_hours[inside], episode.ev_value[inside]


def event_channels(
    episode: Episode,
    vocabulary: Vocabulary,
    n_hours: int,
    bin_edge: BinEdge = "left",
    known: NDArray[np.float32] | None = None,
    first: int = 0,
) -> NDArray[np.float32]:
    """What is known of every code at every hour: last value (normalised), seen now, recency.

    Returns [T, 3 C]. All three are 0 before the first event of a code. Rows before `first` are
    those of `known`.
    """
    n_codes, n_rows = len(vocabulary), n_hours - first
    out = np.empty((n_hours, n_codes, EVENT_CHANNELS), dtype=np.float32)
    last_value = np.zeros(n_codes, dtype=np.float32)
    last_row = np.full(n_codes, -n_hours)  # of an event, counted from `first`
    if known is not None and first:
        out[:first] = known[:first].reshape(first, n_codes, EVENT_CHANNELS)
        last_value, recency = out[first - 1, :, 0], out[first - 1, :, 2]
        # A recency is the exact trace of a whole number of hours.
        ever = recency > 0
        last_row[ever] = np.rint(_RECENCY_HOURS * np.log(recency[ever])) - 1
    code, hour, hours, value = _known_events(episode, vocabulary, n_hours, bin_edge, first)
    row = hour - first

    steps = np.arange(n_rows, dtype=np.int32)[:, None]
    seen = np.full((n_rows, n_codes), -n_hours, dtype=np.int32)
    seen[:1] = last_row
    seen[row, code] = row
    age = steps - running_max(seen)
    out[first:, :, 1] = age == 0
    out[first:, :, 2] = _fading(n_hours).take(np.minimum(age, n_hours))

    valued = np.flatnonzero(~np.isnan(value))
    cell, _, latest = latest_by_cell(
        code[valued] * n_rows + row[valued],
        np.zeros(valued.size, dtype=np.int8),
        hours[valued],
        value[valued],
    )
    valued_code, valued_row = np.divmod(cell, max(n_rows, 1))
    normalised = vocabulary.normalise(valued_code, latest).astype(np.float32)
    place = last_cells(valued_row, valued_code, n_rows, n_codes)
    out[first:, :, 0] = np.concatenate([last_value, normalised]).take(place)
    return out.reshape(n_hours, n_codes * EVENT_CHANNELS)


@lru_cache(maxsize=256)
def _fading(n_hours: int) -> NDArray[np.float32]:
    """Recency by hours since the last event, and 0 at the end: there was none."""
    return np.append(np.exp(-np.arange(n_hours) / _RECENCY_HOURS), 0.0).astype(np.float32)


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
    episode: Episode,
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    n_hours: int,
    known: Features | None = None,
    first: int = 0,
) -> Features:
    """Model input for hours 0..n_hours-1 (at most `preprocessing.max_hours`).

    With causal imputation row t depends on nothing after hour t, so features of a longer prefix
    begin with those of a shorter one, bit for bit. `known` are features of an episode with the
    same static facts and the same items before hour `first` (see `first_difference`): their rows
    before it are taken over and only the rest is computed, to the same bits as without them.

    Raises ValueError if `known` has fewer than `first` rows, or the imputation is not causal.
    """
    n_hours = min(n_hours, preprocessing.max_hours)
    first = min(first, n_hours)
    if first and (known is None or len(known.series) < first or not preprocessing.causal):
        raise ValueError("hours can only be taken over from causal features that have them")
    grid = hourly_grid(
        episode, n_hours, preprocessing.imputation, preprocessing.bin_edge,
        preprocessing.max_hours, first,
    )  # fmt: skip
    scaled = (grid.values - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    scaled = np.clip(scaled, -preprocessing.clip, preprocessing.clip)
    hours_since, observed = grid.hours_since, grid.observed
    series = np.empty((n_hours, preprocessing.n_series), dtype=np.float32)
    if known is not None and first:
        series[:first] = known.series[:first]
        observed = np.concatenate([known.observed[:first], grid.observed])
        # Where nothing was observed from `first` on, what was known before it still holds.
        unseen = hours_since == preprocessing.max_hours
        scaled = np.where(unseen, series[first - 1, :N_VARIABLES], scaled)
        ever = observed[:first].any(axis=0)
        last = first - 1 - np.argmax(observed[first - 1 :: -1], axis=0)
        since = np.arange(first, n_hours)[:, None] - last
        hours_since = np.where(unseen & ever, since, hours_since)
    rows = series[first:]
    rows[:, :N_VARIABLES] = scaled
    if preprocessing.observed_inputs:
        rows[:, N_VARIABLES : 2 * N_VARIABLES] = grid.observed
        age = np.log1p(hours_since) / np.log1p(preprocessing.max_hours)
        rows[:, 2 * N_VARIABLES : 3 * N_VARIABLES] = age
    if preprocessing.static_inputs:
        rows[:, -STATIC_FEATURES:] = static_features(episode.statics)
    events = event_channels(
        episode, vocabulary, n_hours, preprocessing.bin_edge,
        None if known is None else known.events, first,
    )  # fmt: skip
    return Features(series=series, events=events, observed=observed)


def first_difference(old: Episode, new: Episode, preprocessing: Preprocessing) -> int:
    """First hour in which the features of two episodes may differ; `max_hours` if there is none.

    Found by comparing items place by place, so it comes late only if both hold them in the same
    order, as by time. It is never too late an hour, and it knows nothing of `event_tokens`, of
    which a later event can take an earlier one out.
    """
    if old.statics != new.statics:
        return 0
    observation = _first_difference(
        (old.obs_hours, new.obs_hours),
        (old.obs_value, new.obs_value),
        (old.obs_variable, new.obs_variable),
        (old.obs_priority, new.obs_priority),
    )
    event = _first_difference(
        (old.ev_hours, new.ev_hours), (old.ev_value, new.ev_value), (old.ev_code, new.ev_code)
    )
    if observation is not None and not preprocessing.causal:
        return 0
    earliest = min(observation, event, key=lambda hours: np.inf if hours is None else hours)
    if earliest is None:
        return preprocessing.max_hours
    hour = int(hour_of(earliest, preprocessing.bin_edge))
    return min(max(hour, 0), preprocessing.max_hours)


def _first_difference(
    hours: tuple[NDArray[np.float64], NDArray[np.float64]],
    *others: tuple[NDArray[Any], NDArray[Any]],
) -> float | None:
    """Earliest time among the items from the first place on where two lists differ, or None."""
    n = min(len(hours[0]), len(hours[1]))
    for old, new in (hours, *others):
        old, new = old[:n], new[:n]
        # Bits are compared, not numbers: NaN is a value like others here, and 0 is not -0.
        if old.dtype == np.float64:
            old, new = old.view(np.int64), new.view(np.int64)
        differs = old != new
        if differs.any():
            n = int(np.argmax(differs))
    rest = np.concatenate([hours[0][n:], hours[1][n:]])
    return float(rest.min()) if rest.size else None


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
