"""Receiver operating characteristic and precision-recall curves: points, area, picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def _hits(y: Floats, p: Floats) -> tuple[Floats, Floats]:
    """Positives and all among what is called, at every possible threshold from the highest."""
    order = np.argsort(-p, kind="stable")
    last_of_tie = np.append(np.diff(p[order]) != 0, True)
    return np.cumsum(y[order], dtype=np.float64)[last_of_tie], np.flatnonzero(last_of_tie) + 1.0


def roc_points(y: Floats, p: Floats) -> tuple[Floats, Floats]:
    """False and true positive rate, both rising from 0 to 1. Both classes must be there."""
    hits, called = _hits(y, p)
    return np.append(0.0, (called - hits) / (called[-1] - hits[-1])), np.append(0, hits / hits[-1])


def precision_recall_points(y: Floats, p: Floats) -> tuple[Floats, Floats]:
    """Recall, rising from 0 to 1, and precision, which begins at 1 where nothing is called yet."""
    hits, called = _hits(y, p)
    return np.append(0.0, hits / hits[-1]), np.append(1.0, hits / called)


def auprc_trapezoid(y: Floats, p: Floats) -> float:
    """Area under the precision-recall curve by trapezoids, as the MIMIC-III and eICU benchmarks.

    Optimistic where there are few rows: `training.metrics.auprc` is the metric, this one serves
    comparison. NaN when only one class is there.
    """
    if not 0 < y.sum() < len(y):
        return float("nan")
    recall, precision = precision_recall_points(y, p)
    return float(np.trapezoid(precision, recall))


def draw_curves(path: Path, title: str, labels: Mapping[str, tuple[Floats, Floats]]) -> None:
    """A PNG with the two curves of every label: name -> (y, p).

    Labels of one class have no curve and are left out.
    """
    drawn = {name: (y, p) for name, (y, p) in labels.items() if 0 < y.sum() < len(y)}
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    roc, pr = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for name, (y, p) in drawn.items():
        width = 1.6 if len(drawn) == 1 else 0.8
        roc.plot(*roc_points(y, p), linewidth=width, label=name)
        pr.plot(*precision_recall_points(y, p), linewidth=width, label=name)
    roc.set(xlabel="1 − specificity", ylabel="sensitivity", title=title)
    pr.set(xlabel="recall", ylabel="precision", title=f"{len(next(iter(labels.values()))[0])} rows")
    for axes in (roc, pr):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    if len(drawn) > 1:
        pr.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
