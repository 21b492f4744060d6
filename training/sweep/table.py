"""The table of a sweep: mean and spread over the seeds beside what the paper printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from training.run_folder import environment
from training.sweep.config import SweepConfig
from training.sweep.plan import Job
from training.sweep.published import Published, published

# task -> name of the metric in the paper's tables and here -> where `evaluate` reports it. LoS is
# not clipped, and PhysioNet's H is that of the risks as the network gives them, as in the paper.
METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "phenotyping": {m: ("phenotyping", m) for m in ("auroc_macro", "auroc_micro")},
    "decompensation": {m: ("decompensation", m) for m in ("auroc", "auprc", "auprc_trapezoid")},
    "remaining_los": {
        "rmse_days": ("remaining_los_days", "rmse_unclipped"),
        "r2": ("remaining_los_days", "r2_unclipped"),
    },
    "mortality": {
        "auroc": ("mortality_at_48h", "auroc"),
        "auprc": ("mortality_at_48h", "auprc"),
        "auprc_trapezoid": ("mortality_at_48h", "auprc_trapezoid"),
        "physionet_s1": ("mortality_at_48h", "s1"),
        "physionet_s1_oracle": ("mortality_at_48h", "s1_best_threshold_on_this_split"),
        "physionet_h": ("mortality_at_48h", "h_uncalibrated"),
        "physionet_h_calibrated": ("mortality_at_48h", "h"),
    },
    "interpretability": {m: (m,) for m in ("ci_ami", "si_ami", "silhouette")},
}
LOWER_IS_BETTER = ("rmse_days", "physionet_h", "physionet_h_calibrated")


def make_table(config: SweepConfig, jobs: Sequence[Job], *, smoke: bool = False) -> dict[str, Any]:
    """All cells with every single value, as JSON."""
    cells = [
        cell
        for target in config.targets
        for cell in _cells(config, jobs, target.name, target.source)
    ]
    for cell in cells:
        rivals = [c["mean"] for c in cells if _column(c) == _column(cell) and c["mean"] is not None]
        best = (min if cell["metric"] in LOWER_IS_BETTER else max)(rivals, default=None)
        cell["bold"] = cell["mean"] is not None and cell["mean"] == best
    return {
        "title": config.title,
        "table": config.table,
        "preset": config.preset,
        "smoke": smoke,
        "seeds": list(config.seeds),
        "rerun_pretraining": config.rerun_pretraining,
        "environment": environment(),
        "cells": cells,
    }


def _column(cell: dict[str, Any]) -> tuple[str, ...]:
    return cell["source"], cell["target"], cell["task"], cell["metric"]


def _cells(
    config: SweepConfig, jobs: Sequence[Job], target: str, source: str
) -> Iterator[dict[str, Any]]:
    printed = [] if config.table is None else published(config.table)
    for row in config.rows:
        for task in config.tasks:
            of = [
                job
                for job in jobs
                if job.row is row
                and (job.target.name, job.target.source) == (target, source)
                and task in job.tasks
            ]
            if not of:
                continue
            reports = [json.loads(job.metrics.read_text()) for job in of]
            for metric, path in METRICS[task].items():
                values = [value for report in reports for value in _values(report, task, path)]
                match = [
                    p for p in printed
                    if (p.source, p.target, p.row, p.task, p.metric)
                    == (source, target, row.published, task, metric)
                ]  # fmt: skip
                yield {
                    "row": row.name,
                    "source": source,
                    "target": target,
                    "task": task,
                    "metric": metric,
                    **summary(values, lower_is_better=metric in LOWER_IS_BETTER),
                    **against(values, match[0] if match else None),
                    "runs": [str(job.out) for job in of],
                    "facts": [report["facts"] for report in reports],
                }


def _values(report: dict[str, Any], task: str, path: tuple[str, ...]) -> list[float | None]:
    """One value a seed; None where the metric is not defined on the test split."""
    if task == "interpretability":
        return [of[path[0]] for of in report["by_seed"]]
    value = report["tasks"].get(path[0], {}).get(path[1])
    return [value["value"] if isinstance(value, dict) else value]


def summary(values: Sequence[float | None], *, lower_is_better: bool) -> dict[str, Any]:
    """Mean, spread and best over the runs with a value. `std` is that of the paper: ddof 0."""
    known = [v for v in values if v is not None]
    return {
        "values": list(values),
        "mean": float(np.mean(known)) if known else None,
        "std": float(np.std(known)) if known else None,
        "std_ddof1": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "best": (min if lower_is_better else max)(known, default=None),
    }


def against(values: Sequence[float | None], printed: Published | None) -> dict[str, Any]:
    """Difference of our mean to the printed one.

    `beyond_two_sigma` is true where it exceeds twice the spread of both: to be looked at, no
    failure. Null where either has none.
    """
    known = [v for v in values if v is not None]
    if printed is None or not known:
        return {"published": None, "difference": None, "beyond_two_sigma": None}
    difference = float(np.mean(known)) - printed.mean
    beyond = None
    if printed.std is not None:
        beyond = bool(abs(difference) > 2 * np.hypot(np.std(known), printed.std))
    return {
        "published": {"mean": printed.mean, "std": printed.std, "best": printed.best},
        "difference": difference,
        "beyond_two_sigma": beyond,
    }


def markdown(table: dict[str, Any]) -> str:
    """A table a target, then every number beside the paper's."""
    cells = table["cells"]
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [
        f"# {table['title']}",
        "",
        *(
            ["Tiny networks on a few stays: the numbers mean nothing.", ""]
            if table["smoke"]
            else []
        ),
        f"Preset `{table['preset']}`; seeds {seeds}; mean (standard deviation, ddof 0), the best "
        "mean in bold. PhysioNet's scores are best / mean.",
        "",
    ]
    for source, target in dict.fromkeys((c["source"], c["target"]) for c in cells):
        here = [c for c in cells if (c["source"], c["target"]) == (source, target)]
        lines += [f"## {source} to {target}", "", *_grid(here), "", *_warnings(here)]
    compared = [c for c in cells if c["published"] is not None]
    if compared:
        lines += [
            "## Against the paper",
            "",
            "A difference beyond twice the spread of both is marked with !.",
            "",
            "| row | data set | task | metric | ours | paper | difference |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {c['row']} | {c['target']} | {c['task']} | {c['metric']} | {_shown(c)} | "
                f"{_shown(c['published'] | {'metric': c['metric']})} | "
                f"{c['difference']:+.3f}{' !' if c['beyond_two_sigma'] else ''} |"
                for c in compared
            ),
            "",
        ]
    return "\n".join(lines)


def _grid(cells: Sequence[dict[str, Any]]) -> list[str]:
    shown = [c for c in cells if c["mean"] is not None]
    if not shown:
        return ["No stay of the test split has a label."]
    columns = list(dict.fromkeys((c["task"], c["metric"]) for c in shown))
    by_place = {(c["row"], c["task"], c["metric"]): c for c in shown}
    lines = [
        "| | " + " | ".join(f"{task} {metric}" for task, metric in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in dict.fromkeys(c["row"] for c in cells):
        found = [by_place.get((row, *column)) for column in columns]
        texts = [
            "–" if c is None else f"**{_shown(c)}**" if c["bold"] else _shown(c) for c in found
        ]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return lines


def _shown(of: dict[str, Any]) -> str:
    if of["metric"].startswith("physionet"):
        return f"{of['best']:.3f} / {of['mean']:.3f}"
    spread = "" if of["std"] is None else f" ({of['std']:.3f})"
    return f"{of['mean']:.3f}{spread}"


def _warnings(cells: Sequence[dict[str, Any]]) -> list[str]:
    late = dict.fromkeys(
        c["row"]
        for c in cells
        if c["task"] in ("decompensation", "remaining_los")
        and any(facts["uses_later_observations"] for facts in c["facts"])
    )
    if not late:
        return []
    return [f"Hourly answers use later observations: {', '.join(late)}.", ""]
