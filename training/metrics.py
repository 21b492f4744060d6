"""Metrics, each defined once, with confidence intervals by bootstrap over patients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def auroc(y: Floats, p: Floats) -> float:
    """Area under the ROC curve, ties count half; NaN when only one class is there."""
    positives = float(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return float("nan")
    _, tie, size = np.unique(p, return_inverse=True, return_counts=True)
    rank = np.cumsum(size) - (size - 1) / 2  # the mean rank of each group of ties
    above = float(rank[tie] @ y.astype(np.float64)) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def auprc(y: Floats, p: Floats) -> float:
    """Average precision, no interpolation; NaN when only one class is there."""
    positives = float(y.sum())
    if not positives or positives == len(y):
        return float("nan")
    order = np.argsort(-p, kind="stable")
    last_of_tie = np.append(np.diff(p[order]) != 0, True)
    hits = np.cumsum(y[order], dtype=np.float64)[last_of_tie]
    called = np.flatnonzero(last_of_tie) + 1
    return float(np.diff(hits, prepend=0.0) @ (hits / called)) / positives


def two_classes(y: Floats) -> NDArray[np.bool_]:
    """Which labels of y [n, labels] have both classes: the others have no ranking."""
    positives = y.sum(0)
    return (positives > 0) & (positives < len(y))


def macro(metric: Callable[[Floats, Floats], float], y: Floats, p: Floats) -> float:
    """Mean of a ranking metric over the labels of y, p [n, labels] that have both classes.

    NaN when none has.
    """
    values = [metric(y[:, j], p[:, j]) for j in np.flatnonzero(two_classes(y))]
    return float(np.mean(values)) if values else float("nan")


def micro(metric: Callable[[Floats, Floats], float], y: Floats, p: Floats) -> float:
    """A ranking metric over all (label, stay) pairs of y, p [n, labels] at once."""
    return metric(y.ravel(), p.ravel())


def brier(y: Floats, p: Floats) -> float:
    """Mean squared error of the probabilities."""
    return float(np.mean((p - y) ** 2))


def calibration_error(y: Floats, p: Floats, bins: int = 10) -> float:
    """Expected calibration error over bins of equal count: weighted |observed - mean predicted|."""
    parts = np.array_split(np.argsort(p, kind="stable"), bins)
    gaps = [len(i) * abs(y[i].mean() - p[i].mean()) for i in parts if len(i)]
    return float(np.sum(gaps) / len(p))


def calibration_line(y: Floats, p: Floats) -> tuple[float, float]:
    """Intercept and slope of the logistic recalibration line of y on logit(p); ideal is (0, 1)."""
    slope, intercept = fit_platt(np.log(np.clip(p, 1e-7, 1 - 1e-7) / np.clip(1 - p, 1e-7, 1)), y)
    return intercept, slope


def physionet_s1(y: Floats, p: Floats, threshold: float) -> float:
    """Event 1 of the 2012 challenge: min(sensitivity, precision), positive is p >= threshold."""
    positive = p >= threshold
    hits = float((positive & (y == 1)).sum())
    return min(hits / max(float((y == 1).sum()), 1), hits / max(float(positive.sum()), 1))


def s1_threshold(y: Floats, p: Floats) -> float:
    """The threshold with the best Event 1 score; choose it on training data only."""
    order = np.argsort(-p, kind="stable")
    hits = np.cumsum(y[order])
    score = np.minimum(hits / max(float(y.sum()), 1), hits / np.arange(1, len(p) + 1))
    # A threshold calls all of its ties: only the last of equal risks is a possible cut.
    last_of_tie = np.append(p[order][1:] != p[order][:-1], True)
    return float(p[order][np.argmax(np.where(last_of_tie, score, -1))])


def physionet_h(y: Floats, p: Floats, ids: NDArray[Any] | None = None) -> float:
    """Event 2 of the 2012 challenge: Hosmer-Lemeshow H' over ten groups, divided by D.

    Ties in p are ordered by `ids`. Ten groups of floor(N / 10); the remainder is left out, as in
    the official scorer. Infinite when the last group's mean risk does not exceed the first's, NaN
    for fewer than ten patients.
    """
    if len(p) < 10:
        return float("nan")
    order = np.lexsort((np.arange(len(p)) if ids is None else ids, p))
    size = len(p) // 10
    groups = order[: 10 * size].reshape(10, size)
    risk, deaths = p[groups].mean(1), y[groups].sum(1)
    h = ((deaths - size * risk) ** 2 / (size * risk * (1 - risk) + 0.001)).sum()
    d = risk[-1] - risk[0]
    return float(h / d) if d > 0 else float("inf")


def rmse(y: Floats, p: Floats) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.mean((y - p) ** 2)))


def mae(y: Floats, p: Floats) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(y - p)))


def r2(y: Floats, p: Floats) -> float:
    """Coefficient of determination against the mean of the given targets."""
    return float(1 - np.sum((y - p) ** 2) / np.sum((y - y.mean()) ** 2))


def fit_platt(logit: Floats, y: Floats, weight: Floats | None = None) -> tuple[float, float]:
    """a, b of sigmoid(a x + b) by maximum likelihood, with Platt's smoothed targets.

    y may be soft; a row of weight w counts as w rows. Returns (1, 0) when only one class is there.
    """
    x = np.asarray(logit, np.float64)
    line = fit_logistic(np.stack([x, np.ones_like(x)], axis=1), y, weight)
    return (1.0, 0.0) if line is None else (float(line[0]), float(line[1]))


def fit_logistic(
    design: Floats, y: Floats, weight: Floats | None = None
) -> NDArray[np.float64] | None:
    """Coefficients [k] of sigmoid(design @ w), design [n, k], as `fit_platt` fits its two.

    None when only one class is there.
    """
    y = np.asarray(y, np.float64)
    weight = np.ones_like(y) if weight is None else np.asarray(weight, np.float64)
    positive, negative = weight @ y, weight @ (1 - y)
    if positive <= 0 or negative <= 0:
        return None
    target = y * (positive + 1) / (positive + 2) + (1 - y) / (negative + 2)
    # In the basis of an orthogonal design the steps are of one size, whatever the scales.
    scaled, basis = np.linalg.qr(design)
    scaled, basis = scaled * np.sqrt(len(y)), basis / np.sqrt(len(y))

    def loss(w: Floats) -> float:
        return float(weight @ (np.logaddexp(0, scaled @ w) - target * (scaled @ w)))

    w = np.zeros(design.shape[1])
    here = loss(w)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(scaled @ w, -50, 50)))
        gradient = scaled.T @ (weight * (p - target))
        hessian = (scaled * (weight * p * (1 - p))[:, None]).T @ scaled + 1e-9 * np.eye(len(w))
        move = np.linalg.solve(hessian, gradient)
        # Where the risks saturate a full Newton step runs away: halve it until the loss falls.
        while (there := loss(w - move)) > here and np.abs(move).max() > 1e-10:
            move /= 2
        w, here = w - move, there
        if np.abs(move).max() < 1e-10:
            break
    return np.linalg.lstsq(basis, w)[0]


def bootstrap(
    metric: Callable[..., float],
    patients: NDArray[Any],
    *columns: Floats,
    repeats: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of `metric(*columns)`, resampling patients with all their rows.

    Samples on which the metric is not defined are left out.
    """
    _, patient = np.unique(patients, return_inverse=True)
    n = patient.max() + 1
    order = np.argsort(patient, kind="stable")
    starts = np.searchsorted(patient[order], np.arange(n + 1))
    rows_of = [order[starts[i] : starts[i + 1]] for i in range(n)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(repeats):
        rows = np.concatenate([rows_of[i] for i in rng.integers(0, n, n)])
        values.append(metric(*(c[rows] for c in columns)))
    defined = [value for value in values if not np.isnan(value)]
    if not defined:  # one class in every sample
        return float("nan"), float("nan")
    with np.errstate(invalid="ignore"):  # between two infinite values
        low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
