"""Metrics of every task from a table of answers and labels, with 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import metrics as m
from training.evaluation.curves import auprc_trapezoid
from training.labels import certain

Table = Mapping[str, NDArray[Any]]

# The 2012 challenge predicts from the first 48 hours; hour bin 47 is the last of them.
MORTALITY_HOUR = 47
# Phenotypes are judged at the end of a stay; the end of the first day shows what is known early.
DIAGNOSTIC_HOUR = 23


def task_metrics(
    table: Table,
    thresholds: Mapping[str, float],
    phenotypes: Sequence[str] = (),
    *,
    intervals: bool = True,
) -> dict[str, Any]:
    """Metrics of every task that has both answers and labels.

    `intervals` false leaves the intervals null: the bootstrap takes most of the time.
    """
    value = partial(_with_interval, intervals=intervals)
    report: dict[str, Any] = {}
    for task, judge in (
        ("mortality", partial(_mortality, threshold=thresholds.get("mortality"))),
        ("decompensation", _decompensation),
        ("remaining_los", _remaining_los),
        ("phenotyping", partial(_phenotyping, names=phenotypes)),
    ):
        if task in table:
            report |= judge(table, value)
    return report


def scored_rows(table: Table, task: str) -> NDArray[np.bool_]:
    """Rows at which the main metric of a task is taken: where it is read and its label is known.

    Of decompensation only labels that are certain count.
    """
    label, answer = table[f"label_{task}"], table[task]
    if task == "phenotyping":
        return table["last"] & ~np.isnan(label).any(1)
    if task == "mortality":
        return table["read_mortality"] & ~np.isnan(label)
    known = certain(label) if task == "decompensation" else ~np.isnan(label)
    return known & ~np.isnan(answer)


Value = Callable[..., dict[str, float | None]]


def _mortality(table: Table, value: Value, threshold: float | None) -> dict[str, Any]:
    at = scored_rows(table, "mortality")
    if not at.any():
        return {}
    y, p, who = table["label_mortality"][at], table["mortality"][at], table["subject"][at]
    ids = np.unique(table["episode"][at], return_inverse=True)[1]
    raw = table["mortality_uncalibrated"][at]
    report = _probability(table, "mortality", at, value)
    if threshold is not None:
        report["s1"] = value(lambda a, b: m.physionet_s1(a, b, threshold), who, y, p)
        report["s1_threshold"] = threshold
    return {
        "mortality_at_48h": report
        | {
            "s1_best_threshold_on_this_split": m.physionet_s1(y, p, m.s1_threshold(y, p)),
            "h": value(m.physionet_h, who, y, p, ids),
            "h_uncalibrated": value(m.physionet_h, who, y, raw, ids),
        }
    }


def _decompensation(table: Table, value: Value) -> dict[str, Any]:
    report = {}
    at = scored_rows(table, "decompensation")
    if at.any():
        report["decompensation"] = _probability(table, "decompensation", at, value) | {
            "note": "hours whose label the source can only bracket are left out"
        }
    # Where a source is sure of positives at one hour only, telling the hours apart is easy and
    # says nothing: this hour alone shows whether the head tells patients apart.
    if (then := at & (table["hour"] == MORTALITY_HOUR)).any():
        report["decompensation_at_48h"] = _probability(table, "decompensation", then, value)
    return report


def _remaining_los(table: Table, value: Value) -> dict[str, Any]:
    at = scored_rows(table, "remaining_los")
    if not at.any():
        return {}
    y, p, who = (
        table["label_remaining_los"][at] / 24,
        table["remaining_los"][at] / 24,
        table["subject"][at],
    )
    unclipped = table["remaining_los_unclipped"][at] / 24
    report: dict[str, Any] = {
        "hours": int(at.sum()),
        "target_variance": float(np.var(y)),
        "mae": value(m.mae, who, y, p),
        "rmse": value(m.rmse, who, y, p),
        "r2": value(m.r2, who, y, p),
        # A stay cannot remain for less than nothing, but the paper's tables do not clip.
        "rmse_unclipped": value(m.rmse, who, y, unclipped),
        "r2_unclipped": value(m.r2, who, y, unclipped),
    }
    for suffix in ("", "_unclipped"):
        rmse, r2 = (report[f"{name}{suffix}"]["value"] for name in ("rmse", "r2"))
        check_variance(rmse, r2, report["target_variance"])
    if "remaining_los_low" in table:
        width = (table["remaining_los_high"] - table["remaining_los_low"])[at] / 24
        report["interval_coverage"] = value(np.mean, who, covered(table)[at].astype(np.float64))
        report["interval_width"] = value(np.mean, who, width)
    return {"remaining_los_days": report}


def covered(table: Table) -> NDArray[np.bool_]:
    """Which intervals of the remaining stay hold the truth."""
    label = table["label_remaining_los"]
    held: NDArray[np.bool_] = (table["remaining_los_low"] <= label) & (
        label <= table["remaining_los_high"]
    )
    return held


def check_variance(rmse: float | None, r2: float | None, variance: float) -> None:
    """Raise ValueError unless RMSE^2 / (1 - R2) is the variance of the targets.

    It is for every model, if both come from the same rows. Nothing is checked where the targets are
    all the same and R2 is not defined.
    """
    if rmse is None or r2 is None or r2 == 1:
        return
    implied = rmse**2 / (1 - r2)
    if not np.isclose(implied, variance, rtol=1e-3):
        raise ValueError(
            f"RMSE {rmse:.4f} and R2 {r2:.4f} imply targets of variance {implied:.4f}, but it is "
            f"{variance:.4f}: they are not of the same rows"
        )


def _phenotyping(table: Table, value: Value, names: Sequence[str]) -> dict[str, Any]:
    coded = ~np.isnan(table["label_phenotyping"]).any(1)
    answered = ~np.isnan(table["phenotyping"]).any(1)
    early = coded & answered & (table["hour"] == DIAGNOSTIC_HOUR)
    report = {}
    for name, at in (
        ("phenotyping", scored_rows(table, "phenotyping")),
        ("phenotyping_at_24h", early),
    ):
        if at.any():
            report[name] = _labels(table, at, names, partial(value, repeats=200))
    return report


def _labels(
    table: Table, at: NDArray[np.bool_], names: Sequence[str], value: Value
) -> dict[str, Any]:
    y, p, who = table["label_phenotyping"][at], table["phenotyping"][at], table["subject"][at]
    ranked = m.two_classes(y)
    per_label = {}
    for i, name in enumerate(names):
        values = {"positives": int(y[:, i].sum())}
        per_label[name] = values | {"auroc": m.auroc(y[:, i], p[:, i]) if ranked[i] else None}
    return {
        "stays": int(at.sum()),
        "labels_left_out": int((~ranked).sum()),
        "auroc_macro": value(partial(m.macro, m.auroc), who, y, p),
        "auroc_micro": value(partial(m.micro, m.auroc), who, y, p),
        "auprc_macro": value(partial(m.macro, m.auprc), who, y, p),
        "brier": value(m.brier, who, y, p),
        "per_label": per_label,
    }


def _probability(table: Table, task: str, rows: NDArray[np.bool_], value: Value) -> dict[str, Any]:
    y, p, who = table[f"label_{task}"][rows], table[task][rows], table["subject"][rows]
    intercept, slope = m.calibration_line(y, p)
    return {
        "rows": int(rows.sum()),
        "positives": int(y.sum()),
        "auroc": value(m.auroc, who, y, p),
        "auprc": value(m.auprc, who, y, p),
        "auprc_trapezoid": value(auprc_trapezoid, who, y, p),
        "brier": value(m.brier, who, y, p),
        "ece": value(m.calibration_error, who, y, p),
        "calibration_intercept": intercept,
        "calibration_slope": slope,
    }


def _with_interval(
    metric: Callable[..., float],
    who: NDArray[Any],
    *columns: NDArray[Any],
    intervals: bool,
    repeats: int | None = None,
) -> dict[str, float | None]:
    low = high = float("nan")
    if intervals:
        # Hourly tasks have many rows: fewer repeats give the interval to the digits that are shown.
        repeats = repeats or (1000 if len(who) < 20_000 else 200)
        low, high = m.bootstrap(metric, who, *columns, repeats=repeats)
    values = {"value": float(metric(*columns)), "ci95_low": low, "ci95_high": high}
    # JSON has no NaN or infinity: a metric that is not defined on these rows is null.
    return {name: v if np.isfinite(v) else None for name, v in values.items()}
