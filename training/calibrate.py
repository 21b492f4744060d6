"""What is fitted on held-out stays: calibration of the answers and decision thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from llm4ehr.model import Task
from training.dataset import LABEL_COLUMNS
from training.heads import Targets
from training.labels import certain
from training.metrics import fit_platt, s1_threshold


def fit_calibration(outputs: dict[Task, Tensor], targets: Targets) -> dict[str, dict[str, Any]]:
    """Platt parameters and decision thresholds of the probability heads, from held-out stays.

    All phenotypes share one line, fitted on the last hour of the stays. A task without a rising
    line stays uncalibrated. The threshold is the one with the best Event 1 score over the held-out
    hours.
    """
    platt: dict[str, tuple[float, float]] = {}
    thresholds: dict[str, float] = {}
    for task, raw in outputs.items():
        if task == "remaining_los":
            continue
        if task == "phenotyping":
            x, y = raw[targets.last].numpy().ravel(), targets.phenotypes.numpy().ravel()
        else:
            x, y = raw[:, 0].numpy(), targets.hourly[:, LABEL_COLUMNS.index(task)].numpy()
        known = ~np.isnan(y)
        if not known.any():
            continue
        a, b = fit_platt(x[known], y[known])
        if a > 0:
            platt[task] = a, b
        else:  # worse than chance on the few held-out stays: a falling line would turn risks round
            a, b = 1.0, 0.0
        sure = certain(y)
        if task != "phenotyping" and sure.any():
            risk = 1 / (1 + np.exp(-(a * x[sure] + b)))
            thresholds[task] = s1_threshold(y[sure], risk)
    return {"platt": platt, "thresholds": thresholds}
