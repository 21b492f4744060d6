"""Items of an episode as the arrays that the model reads, sorted by content.

Equal facts give equal arrays, in whatever order and portions they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import Episode
from llm4ehr.variables import VARIABLE_INDEX, UnitError
from service.units import EventVocabulary, convert_event

Units = tuple[str | None, ...]
Said = frozenset[tuple[str, str | None]]
Payload = Mapping[str, Any]


def with_observations(
    episode: Episode, payloads: Sequence[Payload], hours: NDArray[np.float64]
) -> Episode:
    """The episode with further observations, recorded later than those in it."""
    if not payloads:
        return episode
    place = _place(episode.obs_hours, hours)
    hours = np.concatenate([episode.obs_hours[place:], hours])
    variable = _appended(
        episode.obs_variable[place:], [VARIABLE_INDEX[p["variable"]] for p in payloads]
    )
    priority = _appended(episode.obs_priority[place:], [p["priority"] for p in payloads])
    value = _appended(episode.obs_value[place:], [p["value"] for p in payloads])
    order = np.lexsort((value, priority, variable, hours))
    return replace(
        episode,
        obs_hours=np.concatenate([episode.obs_hours[:place], hours[order]]),
        obs_variable=np.concatenate([episode.obs_variable[:place], variable[order]]),
        obs_priority=np.concatenate([episode.obs_priority[:place], priority[order]]),
        obs_value=np.concatenate([episode.obs_value[:place], value[order]]),
    )


def with_events(
    episode: Episode, units: Units, payloads: Sequence[Payload], hours: NDArray[np.float64]
) -> tuple[Episode, Units]:
    """The episode and the units of its events with further events, recorded later."""
    if not payloads:
        return episode, units
    place = _place(episode.ev_hours, hours)
    hours = np.concatenate([episode.ev_hours[place:], hours])
    code = _appended(episode.ev_code[place:], [p["code"] for p in payloads])
    value = _appended(
        episode.ev_value[place:], [np.nan if p["value"] is None else p["value"] for p in payloads]
    )
    later = [*units[place:], *(p["unit"] for p in payloads)]
    said = np.array([unit or "" for unit in later], dtype=np.str_)
    order = np.lexsort((said, value, code.astype(str), hours))
    episode = replace(
        episode,
        ev_hours=np.concatenate([episode.ev_hours[:place], hours[order]]),
        ev_code=np.concatenate([episode.ev_code[:place], code[order]]),
        ev_value=np.concatenate([episode.ev_value[:place], value[order]]),
    )
    return episode, units[:place] + tuple([later[i] for i in order.tolist()])


def in_units_of(vocabulary: EventVocabulary, episode: Episode, units: Units, said: Said) -> Episode:
    """The episode with event values in the units of a vocabulary; NaN if they do not convert.

    `said` are the distinct pairs of code and unit among its events.
    """
    wanted: dict[tuple[str, str | None], str] = {}
    for code, unit in said:
        entry = vocabulary.entry(code)
        if entry is not None and entry.unit is not None and entry.unit != unit:
            wanted[code, unit] = entry.unit
    if not wanted:
        return episode
    value = episode.ev_value.copy()
    of_code: dict[str, NDArray[np.bool_]] = {}
    in_unit = {unit: np.array([u == unit for u in units]) for unit in {u for _, u in wanted}}
    for (code, unit), to in wanted.items():
        if code not in of_code:
            of_code[code] = episode.ev_code == code
        where = of_code[code] & in_unit[unit] & ~np.isnan(value)
        if where.any():
            value[where] = [_converted(code, v, unit, to) for v in value[where].tolist()]
    return replace(episode, ev_value=value)


def _converted(code: str, value: float, unit: str | None, to: str) -> float:
    try:
        return convert_event(code, value, unit, to)
    except UnitError:
        return np.nan


def _place(hours: NDArray[np.float64], new: NDArray[np.float64]) -> int:
    """Where the rows begin that have to be sorted with the new ones."""
    return int(np.searchsorted(hours, new.min()))


def _appended(old: NDArray[Any], new: list[Any]) -> NDArray[Any]:
    return np.concatenate([old, np.array(new, dtype=old.dtype)])
