"""What is fitted on held-out stays: calibration, intervals and decision thresholds.

Mortality and the phenotypes have one label a stay, so every stay weighs the same; decompensation is
asked again at every hour, and every hour weighs the same. How far raw outputs mean what they say
changes with the hour of the stay, since the network knows more later on: the line of mortality
follows the logarithm of the hour, as long as there are enough deaths to fit it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from llm4ehr.calibration import (
    MAX_KNOTS,
    Calibration,
    HoursKind,
    Interval,
    OutputMap,
    calibration_json,
    conformal_rank,
    default_calibration,
)
from llm4ehr.model import Task
from training.config import FinetuneConfig
from training.dataset import LABEL_COLUMNS
from training.heads import Targets
from training.labels import certain
from training.metrics import fit_logistic, fit_platt, s1_threshold

Method = Literal["none", "platt", "temperature", "isotonic", "platt_isotonic"]
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

# Ten events for each of the four parameters of a line that follows the hour, and for knots.
MIN_POSITIVE_STAYS = 40
# Hours at which a bin of the intervals may begin.
_INTERVAL_HOURS = (0, 12, 24, 48, 96)
# With fewer stays the width of a bin would be that of its one or two worst stays.
_MIN_INTERVAL_STAYS = 30


def fit_calibration(
    config: FinetuneConfig, outputs: dict[Task, Tensor], targets: Targets
) -> dict[str, dict[str, Any]]:
    """`calibration` (JSON of every head) and `thresholds` of the heads, from held-out stays.

    A threshold is the risk with the best Event 1 score over the held-out hours. Phenotypes share
    one map, fitted at the last hour of the stays, and have none.
    """
    stay = targets.stay.numpy()
    hours = hours_of(stay)
    calibration = default_calibration(list(outputs), config.los_scale)
    thresholds: dict[str, float] = {}
    for task, output in outputs.items():
        raw = output.double().numpy()
        if task == "phenotyping":
            last = targets.last.numpy()
            y = targets.phenotypes.numpy()
            of_stay = np.repeat(np.arange(len(last)), y.shape[1])
            calibration[task] = fit_map(
                config.calibration, raw[last].ravel(), y.ravel(), of_stay, np.zeros(y.size, int),
                by_stay=False, by_hour=False,
            )  # fmt: skip
            continue
        y = targets.hourly[:, LABEL_COLUMNS.index(task)].numpy()
        if task == "remaining_los":
            interval = fit_interval(raw[:, 0], y, stay, hours, config)
            calibration[task] = replace(calibration[task], interval=interval)
            continue
        mortality = task == "mortality"
        calibration[task] = fit_map(
            config.calibration, raw[:, 0], y, stay, hours, by_stay=mortality, by_hour=mortality
        )
        sure = certain(y)
        if sure.any():
            risk = calibration[task](raw[sure], hours[sure])[:, 0]
            thresholds[task] = s1_threshold(y[sure], risk)
    return {"calibration": calibration_json(calibration), "thresholds": thresholds}


def uncalibrated(config: FinetuneConfig) -> dict[str, dict[str, Any]]:
    """What `fit_calibration` gives without held-out stays."""
    calibration: Calibration = default_calibration(list(config.tasks), config.los_scale)
    return {"calibration": calibration_json(calibration), "thresholds": {}}


def hours_of(stay: Ints) -> NDArray[np.int64]:
    """Hour of every row of whole stays, given the stay [N] of each."""
    first = np.flatnonzero(np.diff(stay, prepend=-1))
    return np.arange(len(stay)) - np.repeat(first, np.diff(np.append(first, len(stay))))


def fit_map(
    method: Method,
    raw: Floats,
    y: Floats,
    stay: Ints,
    hours: Ints,
    *,
    by_stay: bool,
    by_hour: bool,
) -> OutputMap:
    """The map of one head from rows [N]; y may be soft, NaN = unknown.

    `by_stay`: every stay weighs the same, else every row. `by_hour`: the line follows the hour.
    With fewer than MIN_POSITIVE_STAYS stays of either class the map is one line for all hours, and
    uncalibrated where that does not rise: a falling line would turn the order of risks round.
    """
    known = ~np.isnan(y)
    x, y, stay, hours = raw[known], y[known].astype(np.float64), stay[known], hours[known]
    if method == "none" or not known.any():
        return OutputMap(kind="platt")
    weight = stay_weights(stay) if by_stay else np.ones_like(y)
    if method == "temperature":
        fitted = fit_logistic(x[:, None], y, weight)
        return OutputMap(
            kind="platt", a=1.0 if fitted is None or fitted[0] <= 0 else float(fitted[0])
        )
    enough = min(len(np.unique(stay[y >= 0.5])), len(np.unique(stay[y < 0.5])))
    line = _hourly_line(x, y, hours, weight) if by_hour and enough >= MIN_POSITIVE_STAYS else None
    line = line or _line(x, y, weight)
    if line is None:
        return OutputMap(kind="platt")
    if method == "platt" or enough < MIN_POSITIVE_STAYS:
        return line
    n_stays = len(np.unique(stay))
    z = line.line(x[:, None], hours)[:, 0]
    return replace(line, kind=method, knots=_knots(z, y, weight, n_stays))


def stay_weights(stay: Ints) -> NDArray[np.float64]:
    """Weights of rows with which every stay weighs 1."""
    _, of, count = np.unique(stay, return_inverse=True, return_counts=True)
    return 1.0 / count[of]


def _line(x: Floats, y: Floats, weight: Floats) -> OutputMap | None:
    a, b = fit_platt(x, y, weight)
    return OutputMap(kind="platt", a=a, b=b) if a > 0 else None


def _hourly_line(x: Floats, y: Floats, hours: Ints, weight: Floats) -> OutputMap | None:
    """A line whose slope and level follow the log of the hour, if it rises at every hour.

    Later than the last hour with MIN_POSITIVE_STAYS positives it stays as it is there.
    """
    positives = np.bincount(hours[y >= 0.5])
    there = np.flatnonzero(positives >= MIN_POSITIVE_STAYS)
    if not len(there) or there[-1] < 1:
        return None
    last_hour = int(there[-1])
    u = np.log1p(np.minimum(hours, last_hour))
    if u.min() == u.max():  # what follows the hour and what does not are the same column
        return None
    fitted = fit_logistic(np.stack([x, np.ones_like(x), u * x, u], axis=1), y, weight)
    if fitted is None:
        return None
    a, b, a_hour, b_hour = map(float, fitted)
    if min(a, a + a_hour * np.log1p(last_hour)) <= 0:
        return None
    return OutputMap(kind="platt", a=a, b=b, a_hour=a_hour, b_hour=b_hour, last_hour=last_hour)


def _knots(z: Floats, y: Floats, weight: Floats, n_stays: int) -> tuple[tuple[float, float], ...]:
    """Isotonic regression of y on z as lines between the centres of its steps.

    Lines keep an answer from jumping where the raw output moves in its last digits (centred
    isotonic regression, Oron & Flournoy 2017). One more stay with the mean risk keeps the ends away
    from 0 and 1.
    """
    order = np.argsort(z, kind="stable")
    z, y, weight = z[order], y[order], weight[order]
    fitted = IsotonicRegression().fit_transform(z, y, sample_weight=weight)
    rises = np.diff(fitted, prepend=-1.0) > 1e-9  # less is rounding within a step
    levels, step = fitted[rises], np.cumsum(rises) - 1
    centre = np.bincount(step, weight * z) / np.bincount(step, weight)
    mean = float(weight @ y / weight.sum())
    p = (n_stays * levels + mean) / (n_stays + 1)
    chosen = np.unique(np.linspace(0, len(p) - 1, min(len(p), MAX_KNOTS)).round().astype(int))
    return tuple((float(centre[i]), float(p[i])) for i in chosen)


def fit_interval(
    raw: Floats, hours_left: Floats, stay: Ints, hours: Ints, config: FinetuneConfig
) -> Interval | None:
    """Split conformal interval of the remaining stay, rows [N]; None with too few stays.

    One hour of every stay is drawn, so that the scores are those of independent stays; the score is
    the distance of raw output and truth on the scale of the head. Each bin of hours has its own
    quantile, ceil((n + 1) coverage) of n (Mondrian); a bin with few stays is one with the next.
    """
    rows = one_row_a_stay(stay, ~np.isnan(hours_left), config.seed)
    truth = on_scale(hours_left[rows].astype(np.float64), config.los_scale)
    score, at = np.abs(raw[rows] - truth), hours[rows]
    starts = _merged(at, config.coverage)
    if not starts:
        return None
    widths, stays = [], []
    for start, end in zip(starts, [*starts[1:], np.inf], strict=True):
        inside = np.sort(score[(at >= start) & (at < end)])
        rank = conformal_rank(len(inside), config.coverage)
        assert rank is not None  # `_merged` saw to it
        widths.append(float(inside[rank - 1]))
        stays.append(len(inside))
    return Interval(
        coverage=config.coverage,
        first_hours=tuple(starts),
        half_widths=tuple(widths),
        stays=tuple(stays),
    )


def one_row_a_stay(stay: Ints, known: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """A random known row of every stay that has one."""
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(known))
    return np.sort(rows[np.unique(stay[rows], return_index=True)[1]])


def on_scale(hours_left: Floats, scale: HoursKind) -> Floats:
    """Remaining hours as the head answers them."""
    return np.log1p(hours_left / 24) if scale == "log_days" else hours_left / 24


def _merged(at: Ints, coverage: float) -> list[int]:
    """First hours of bins that have enough stays each, by the number of stays alone."""
    fewest = _MIN_INTERVAL_STAYS
    while conformal_rank(fewest, coverage) is None:
        fewest += 1
    starts = [0]
    for start in _INTERVAL_HOURS[1:]:
        if ((at >= starts[-1]) & (at < start)).sum() >= fewest:
            starts.append(start)
    while len(starts) > 1 and (at >= starts[-1]).sum() < fewest:
        starts.pop()
    return starts if conformal_rank(len(at), coverage) is not None else []
