"""From raw head outputs to what is reported: probabilities and hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm4ehr.model import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMap:
    """How the raw output of one head becomes an answer.

    "platt": probability = sigmoid(a x + b) (Platt scaling; a = 1, b = 0 leaves the logit as it is).
    "log_days": hours = 24 (exp(a x + b) - 1); "days": hours = 24 (a x + b). Hours are at least 0.
    """

    kind: Literal["platt", "log_days", "days"]
    a: float = 1.0
    b: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("platt", "log_days", "days"):
            raise ValueError(f"unknown kind of calibration {self.kind!r}")

    def __call__(self, raw: NDArray[np.floating]) -> NDArray[np.float64]:
        """Apply to raw outputs of any shape, in float64."""
        x = self.a * np.asarray(raw, dtype=np.float64) + self.b
        if self.kind == "platt":
            return 1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0)))
        days = np.expm1(np.minimum(x, 10.0)) if self.kind == "log_days" else x
        return np.maximum(24.0 * days, 0.0)


Calibration = dict[Task, OutputMap]


def default_calibration(tasks: list[Task]) -> Calibration:
    """Uncalibrated: plain sigmoid, and remaining stay on the log scale it is trained on."""
    return {t: OutputMap(kind="log_days" if t == "remaining_los" else "platt") for t in tasks}
