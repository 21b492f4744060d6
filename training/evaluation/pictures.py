"""Pictures of an evaluation: ranking, calibration, and how often intervals hold the truth."""

from __future__ import annotations

from pathlib import Path

from training.evaluation.curves import draw_curves
from training.evaluation.reliability import draw_interval_coverage, draw_reliability
from training.evaluation.report import Table, covered, scored_rows
from training.evaluation.scorer import Scorer


def draw_pictures(folder: Path, table: Table, scorer: Scorer) -> None:
    """`<task>.png` and `<task>_calibration.png` of every probability, at the rows that are scored.

    Where the remaining stay has intervals also `remaining_los_intervals.png`.
    """
    for task in ("mortality", "decompensation", "phenotyping"):
        if task not in table or not (at := scored_rows(table, task)).any():
            continue
        y, p = table[f"label_{task}"][at], table[task][at]
        labels = (
            {name: (y[:, i], p[:, i]) for i, name in enumerate(scorer.phenotypes)}
            if task == "phenotyping"
            else {task: (y, p)}
        )
        draw_curves(folder / f"{task}.png", task, labels)
        draw_reliability(folder / f"{task}_calibration.png", task, y.ravel(), p.ravel())
    los = scorer.calibration.get("remaining_los")
    if los is None or los.interval is None:
        return
    if (at := scored_rows(table, "remaining_los")).any():
        draw_interval_coverage(
            folder / "remaining_los_intervals.png",
            "remaining_los",
            covered(table)[at],
            table["hour"][at],
            los.interval.coverage,
        )
