"""How answers are taken from the hours of a stay: at every hour, once a stay, or once a patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.config import Readout


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How answers are taken from the hours of a stay; the names are those of `FinetuneConfig`.

    The defaults are those of a deployed model: at every hour, of every stay.
    """

    mortality: Readout = "hourly"
    phenotyping: Readout = "hourly"
    hourly_unit: Literal["hour", "patch"] = "hour"
    max_hours: int | None = None
    mortality_min_hours: float = 0.0

    @classmethod
    def of(cls, finetuning: Mapping[str, Any]) -> Reading:
        """That of a fine-tuning run, from its resolved configuration."""
        return cls(
            **finetuning["readout"],
            hourly_unit=finetuning["hourly_unit"],
            max_hours=finetuning["max_hours"],
            mortality_min_hours=finetuning["mortality_min_hours"],
        )

    @property
    def hourly(self) -> bool:
        """Whether every task is answered at every hour."""
        return {self.mortality, self.phenotyping} == {"hourly"} and self.hourly_unit == "hour"


def stay_answer(raw_TN: NDArray[np.float32], how: Readout) -> NDArray[np.float32]:
    """The answer of a stay as a whole at its last hour; NaN at the hours before (M16)."""
    out = np.full_like(raw_TN, np.nan)
    if len(raw_TN):
        if how == "mean":
            out[-1] = raw_TN.mean(0)
        elif how == "max":
            out[-1] = raw_TN.max(0)
        else:
            out[-1] = raw_TN[-1]
    return out


def patch_answers(raw_TN: NDArray[np.float32], hours: int) -> NDArray[np.float32]:
    """The mean of every patch of so many hours, at its last hour; NaN elsewhere (M14)."""
    out = np.full_like(raw_TN, np.nan)
    for first in range(0, len(raw_TN), hours):
        patch = raw_TN[first : first + hours]
        out[first + len(patch) - 1] = patch.mean(0)
    return out


def patch_labels(
    label_T: NDArray[np.float32], hours: int, which: Literal["max", "min"]
) -> NDArray[np.float32]:
    """The highest or lowest known label of every patch, at its last hour; NaN elsewhere (M14)."""
    pick = np.fmax if which == "max" else np.fmin
    out = np.full_like(label_T, np.nan)
    for first in range(0, len(label_T), hours):
        patch = label_T[first : first + hours]
        out[first + len(patch) - 1] = pick.reduce(patch)
    return out
