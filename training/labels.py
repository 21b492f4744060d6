"""Labels of a stay: hour by hour for three tasks, once a stay for the phenotypes.

The state of hour bin t is paired with the label of time t + 1, the end of the bin (M13
`label_align="bin_end"`); "bin_start" pairs it with time t and so looks one hour ahead of the label.
Labels are plain numbers with NaN where the source cannot tell or the task is not asked. When a task
is asked follows the MIMIC-III benchmark (Harutyunyan et al. 2019); docs/labels.md has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.episode import Episode
from llm4ehr.store import EpisodeRecord, Outcome
from training.data.phenotypes import PHENOTYPES

LabelAlign = Literal["bin_end", "bin_start"]
DECOMPENSATION_HORIZON_HOURS = 24.0
MIN_HISTORY_HOURS = 4.0  # the benchmark's: the first labelled time is 5

_PHENOTYPE_INDEX = {name: i for i, name in enumerate(PHENOTYPES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """How hours are paired with labels, how much of a stay must be seen first, and (M23) how long a
    stay must be for mortality to be asked of it."""

    align: LabelAlign = "bin_end"
    min_history_hours: float = MIN_HISTORY_HOURS
    mortality_min_hours: float = 0.0


DEFAULT_LABELS = LabelOptions()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HourlyLabels:
    """Labels of one stay, one row an hour; NaN = unknown or not asked.

    `decompensation` is the probability that death comes within 24 hours: 0 or 1 where the source is
    sure, in between where it only knows an interval for the time of death. `mortality` repeats the
    episode's label at every whole hour of the stay. `remaining_los` is in hours.
    """

    decompensation: NDArray[np.float32]  # [T]
    mortality: NDArray[np.float32]  # [T]
    remaining_los: NDArray[np.float32]  # [T]
    valid: NDArray[np.bool_]  # [T] hours at which tasks are asked, whether or not a label is known


def hourly_labels(
    outcome: Outcome,
    n_hours: int,
    options: LabelOptions = DEFAULT_LABELS,
    *,
    first_observation: float,
) -> HourlyLabels:
    """Labels of hours 0..n_hours-1.

    Decompensation and remaining stay are asked at times after `options.min_history_hours` and after
    the first observation, up to the end of the stay and while the patient lives; mortality at every
    hour that ends inside the stay, of stays of `options.mortality_min_hours` or more. A death known
    to lie in [low, high) is taken as uniform in it.
    """
    end_of_bin = np.arange(1, n_hours + 1, dtype=np.float64)
    time = end_of_bin - (0.0 if options.align == "bin_end" else 1.0)
    los = np.inf if outcome.los_hours is None else outcome.los_hours
    low, high = outcome.death_hours_low, outcome.death_hours_high
    latest_death = np.inf if high is None else high

    def inside(t: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (t <= los) & (t < latest_death)

    valid = inside(time) & (time > options.min_history_hours) & (time > first_observation)
    unknown = np.full(n_hours, np.nan)
    decompensation = mortality = unknown
    if outcome.mortality is not None:
        if los >= options.mortality_min_hours:
            mortality = np.where(inside(end_of_bin), float(outcome.mortality), np.nan)
        if not outcome.mortality:
            decompensation = np.zeros(n_hours)
        elif low is not None and high is not None:
            reach = time + DECOMPENSATION_HORIZON_HOURS
            # Of a death at an exact time nothing lies between the borders: the label is 0 or 1.
            with np.errstate(over="ignore"):
                decompensation = np.clip((reach - low) / (high - low), 0.0, 1.0)
    remaining = unknown if outcome.los_hours is None else los - time
    return HourlyLabels(
        decompensation=np.where(valid, decompensation, np.nan).astype(np.float32),
        mortality=mortality.astype(np.float32),
        remaining_los=np.where(valid, remaining, np.nan).astype(np.float32),
        valid=valid,
    )


def record_labels(record: EpisodeRecord, n_hours: int, options: LabelOptions) -> HourlyLabels:
    """`hourly_labels` of a stay of a store."""
    first = first_observation(record.episode)
    return hourly_labels(record.outcome, n_hours, options, first_observation=first)


def first_observation(episode: Episode) -> float:
    """Hour of the first observation of any variable; infinite in a stay without one."""
    inside = episode.obs_hours[episode.obs_hours >= 0]
    return float(inside.min()) if inside.size else float("inf")


def phenotype_flags(outcome: Outcome) -> NDArray[np.float32]:
    """The 25 flags of a stay [25] in the order of PHENOTYPES; NaN where the source does not tell.

    Raises ValueError for a name that is not one of them.
    """
    if outcome.phenotypes is None:
        return np.full(len(PHENOTYPES), np.nan, np.float32)
    if unknown := set(outcome.phenotypes) - _PHENOTYPE_INDEX.keys():
        raise ValueError(f"unknown phenotype {min(unknown)!r}")
    flags = np.zeros(len(PHENOTYPES), np.float32)
    flags[[_PHENOTYPE_INDEX[name] for name in outcome.phenotypes]] = 1
    return flags


def certain(probability: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a decompensation label is 0 or 1: the only hours that are scored."""
    return (probability == 0) | (probability == 1)
