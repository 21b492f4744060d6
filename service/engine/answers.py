"""From what the heads gave for the rows of a tick to the answers for their hours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llm4ehr.bundle import Bundle
from llm4ehr.model import Task
from service.core import AnswerLayout

_COLUMNS: dict[Task, int] = {"decompensation": 1, "mortality": 2, "remaining_los": 3}
_LOW, _HIGH, _PHENOTYPES = 4, 5, 6


class Answers:
    """The calibration of a bundle, applied to many rows at once."""

    def __init__(self, bundle: Bundle) -> None:
        self._calibration = bundle.calibration
        tasks = frozenset(bundle.network.model.config.heads)
        los = bundle.calibration.get("remaining_los")
        interval = los.interval if los is not None and "remaining_los" in tasks else None
        self.layout = AnswerLayout(
            tasks=tasks,
            phenotypes=bundle.phenotypes if "phenotyping" in tasks else (),
            coverage=None if interval is None else interval.coverage,
        )

    def rows(
        self,
        raw: Mapping[Task, NDArray[np.float32]],
        hours: NDArray[np.int64],
        imputed_share: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Answers [R, width] to `raw` (task -> [R, n], finite) of rows at `hours` [R]."""
        out = np.zeros((len(hours), self.layout.width))
        out[:, 0] = imputed_share
        for task, given in raw.items():
            answers = self._calibration[task](given, hours)
            if task == "phenotyping":
                out[:, _PHENOTYPES:] = answers
            else:
                out[:, _COLUMNS[task]] = answers[:, 0]
        if self.layout.coverage is not None:
            low, high = self._calibration["remaining_los"].bounds(raw["remaining_los"], hours)
            out[:, _LOW], out[:, _HIGH] = low[:, 0], high[:, 0]
        return out
