"""From what the heads gave for the rows of a tick to the answers for their hours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Bundle
from llm4ehr.model import Task
from service.core import HourScore, HoursInterval


class Answers:
    """The calibration of a bundle, applied to many rows at once."""

    def __init__(self, bundle: Bundle) -> None:
        self._calibration = bundle.calibration
        self._phenotypes = bundle.phenotypes

    def rows(
        self,
        raw: Mapping[Task, NDArray[np.float32]],
        hours: NDArray[np.int64],
        imputed_share: NDArray[np.float64],
    ) -> list[HourScore]:
        """Answers to `raw` (task -> [R, n], finite) of rows at `hours` [R]."""
        answers = {task: self._calibration[task](out, hours).tolist() for task, out in raw.items()}
        intervals = self._intervals(raw, hours)

        def one(task: Task, row: int) -> float | None:
            return answers[task][row][0] if task in answers else None

        return [
            HourScore(
                hour=hour,
                decompensation=one("decompensation", row),
                mortality=one("mortality", row),
                remaining_los_hours=one("remaining_los", row),
                remaining_los_interval_hours=intervals[row],
                phenotypes=dict(
                    zip(self._phenotypes, answers["phenotyping"][row], strict=True)
                    if "phenotyping" in answers
                    else ()
                ),
                imputed_share=share,
            )
            for row, (hour, share) in enumerate(
                zip(hours.tolist(), imputed_share.tolist(), strict=True)
            )
        ]

    def _intervals(
        self, raw: Mapping[Task, NDArray[np.float32]], hours: NDArray[np.int64]
    ) -> list[HoursInterval | None]:
        los = self._calibration.get("remaining_los")
        if los is None or los.interval is None or "remaining_los" not in raw:
            return [None] * len(hours)
        low, high = los.bounds(raw["remaining_los"], hours)
        ends = zip(low[:, 0].tolist(), high[:, 0].tolist(), strict=True)
        return [HoursInterval(low=a, high=b, coverage=los.interval.coverage) for a, b in ends]
