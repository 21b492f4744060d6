"""Hourly labels from what a source knows about the outcome of a stay.

The state of hour bin t is paired with the label of time t + 1, the end of the bin (M13
`label_align="bin_end"`); "bin_start" pairs it with time t and so looks one hour ahead of the label.
Labels are plain numbers with NaN where the source cannot tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.store import Outcome

LabelAlign = Literal["bin_end", "bin_start"]
DECOMPENSATION_HORIZON_HOURS = 24.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HourlyLabels:
    """Labels of one stay, one row an hour; NaN = unknown.

    `decompensation` is the probability that death comes within 24 hours: 0 or 1 where the source is
    sure, in between where it only knows an interval for the time of death. `mortality` repeats the
    episode's label at every hour. `remaining_los` is in hours.
    """

    decompensation: NDArray[np.float32]  # [T]
    mortality: NDArray[np.float32]  # [T]
    remaining_los: NDArray[np.float32]  # [T]


def hourly_labels(outcome: Outcome, n_hours: int, align: LabelAlign = "bin_end") -> HourlyLabels:
    """Labels of hours 0..n_hours-1.

    A death known to lie in [low, high) is taken as uniform in it. A stay that ended alive has no
    decompensation at any hour. Hours after the end of the stay have no remaining stay.
    """
    time = np.arange(n_hours, dtype=np.float64) + (1.0 if align == "bin_end" else 0.0)
    unknown = np.full(n_hours, np.nan)
    if outcome.mortality is None:
        decompensation = mortality = unknown
    else:
        mortality = np.full(n_hours, float(outcome.mortality))
        if not outcome.mortality:
            decompensation = np.zeros(n_hours)
        elif outcome.death_hours_low is None or outcome.death_hours_high is None:
            decompensation = unknown
        else:
            low, high = outcome.death_hours_low, outcome.death_hours_high
            reach = time + DECOMPENSATION_HORIZON_HOURS
            decompensation = np.clip((reach - low) / max(high - low, 1e-9), 0.0, 1.0)
            decompensation = np.where(time >= high, np.nan, decompensation)
    if outcome.los_hours is None:
        remaining = unknown
    else:
        left = outcome.los_hours - time
        remaining = np.where(left >= 0, left, np.nan)
    return HourlyLabels(
        decompensation=decompensation.astype(np.float32),
        mortality=mortality.astype(np.float32),
        remaining_los=remaining.astype(np.float32),
    )


def certain(probability: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a decompensation label is 0 or 1: the only hours that are scored."""
    return (probability == 0) | (probability == 1)
