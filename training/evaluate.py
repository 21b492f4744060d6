"""Score a split of an episode store and say how good the answers are.

Scoring goes through `llm4ehr.offline`, the same road as batch jobs of the service.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llm4ehr.bundle import Network, load_bundle, load_network
from llm4ehr.calibration import Calibration, OutputMap, default_calibration
from llm4ehr.offline import score_episodes
from llm4ehr.store import EpisodeStore
from training import metrics as m
from training.labels import LabelAlign, certain, hourly_labels
from training.loop import environment
from training.progress import track

# The 2012 challenge predicts from the first 48 hours; hour bin 47 is the last of them.
MORTALITY_HOUR = 47


def evaluate(model: Path, store: Path, split: str, out: Path | None = None) -> dict[str, Any]:
    """Metrics of a bundle or fine-tuning run on one split, with 95 % bootstrap intervals.

    Writes metrics.json and predictions.parquet to `out` if given. Raises ValueError when the split
    is empty.
    """
    scorer = load_scorer(model)
    table = hourly_table(scorer, EpisodeStore.open(store), split)
    report = {
        "model": str(model),
        "command": f"python -m training evaluate {model} --store {store} --split {split}",
        "store": EpisodeStore.open(store).info.source,
        "split": split,
        "episodes": len(np.unique(table["episode"])),
        "seed_of_bootstrap": 0,
        "tasks": task_metrics(table, scorer.thresholds),
        "environment": environment(),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(report, indent=2))
        pq.write_table(pa.table(table), out / "predictions.parquet")
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A network with all that is needed to turn its outputs into answers and judge them."""

    network: Network
    calibration: Calibration
    thresholds: dict[str, float]
    label_align: LabelAlign


def load_scorer(model: Path) -> Scorer:
    """The scorer of a bundle folder or of a fine-tuning run.

    Raises BundleError, or ValueError for a run without heads.
    """
    if (model / "manifest.json").exists():
        bundle = load_bundle(model.parent.parent, model.parent.name, int(model.name))
        return Scorer(
            network=bundle.network,
            calibration=bundle.calibration,
            thresholds=bundle.labels["thresholds"],
            label_align=bundle.labels["label_align"],
        )
    network = load_network(model)
    if not network.model.config.heads:
        raise ValueError(f"{model}: the network has no heads; name a fine-tuning run or a bundle")
    calibration = default_calibration(list(network.model.config.heads))
    result = json.loads((model / "result.json").read_text())
    for task, (a, b) in result["platt"].items():
        calibration[task] = OutputMap(kind="platt", a=a, b=b)
    return Scorer(
        network=network,
        calibration=calibration,
        thresholds=result["thresholds"],
        label_align=json.loads((model / "finetune.json").read_text())["label_align"],
    )


def hourly_table(scorer: Scorer, store: EpisodeStore, split: str) -> dict[str, NDArray[Any]]:
    """Answers and labels as columns, one row an episode-hour."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for block in track(store.blocks(), f"scoring split {split}", store.n_blocks):
        records = [r for r in block if r.split == split]
        scored = score_episodes(scorer.network, [r.episode for r in records])
        for record, scores in zip(records, scored, strict=True):
            n = len(scores.hidden)
            labels = hourly_labels(record.outcome, n, scorer.label_align)
            columns: dict[str, NDArray[Any]] = {
                "episode": np.full(n, record.episode.episode_id),
                "subject": np.full(n, record.subject_id),
                "hour": np.arange(n),
                "label_decompensation": labels.decompensation,
                "label_mortality": labels.mortality,
                "label_remaining_los": labels.remaining_los,
            }
            for task, answer in scores.answers(scorer.calibration).items():
                columns[task] = answer[:, 0]
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
    if not parts:
        raise ValueError(f"split {split!r} has no episodes in this store")
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def task_metrics(table: dict[str, NDArray[Any]], thresholds: dict[str, float]) -> dict[str, Any]:
    """Metrics of every task that has both answers and labels."""
    report: dict[str, Any] = {}
    if "mortality" in table:
        at = (table["hour"] == MORTALITY_HOUR) & ~np.isnan(table["label_mortality"])
        if at.any():
            report["mortality_at_48h"] = _mortality(table, at, thresholds.get("mortality"))
    if "decompensation" in table:
        sure = certain(table["label_decompensation"])
        if sure.any():
            report["decompensation"] = _probability(table, "decompensation", sure) | {
                "note": "hours whose label the source can only bracket are left out"
            }
        # Where a source is sure of positives at one hour only, telling the hours apart is easy and
        # says nothing: this hour alone shows whether the head tells patients apart.
        if (at := sure & (table["hour"] == MORTALITY_HOUR)).any():
            report["decompensation_at_48h"] = _probability(table, "decompensation", at)
    if "remaining_los" in table:
        known = ~np.isnan(table["label_remaining_los"])
        if known.any():
            y, p = table["label_remaining_los"][known] / 24, table["remaining_los"][known] / 24
            who = table["subject"][known]
            report["remaining_los_days"] = {
                "hours": int(known.sum()),
                "mae": _with_interval(m.mae, who, y, p),
                "rmse": _with_interval(m.rmse, who, y, p),
                "r2": _with_interval(m.r2, who, y, p),
            }
    return report


def _mortality(
    table: dict[str, NDArray[Any]], at: NDArray[np.bool_], threshold: float | None
) -> dict[str, Any]:
    y, p, who = table["label_mortality"][at], table["mortality"][at], table["subject"][at]
    report = _probability(table, "mortality", at)
    if threshold is not None:
        report["s1"] = _with_interval(lambda a, b: m.physionet_s1(a, b, threshold), who, y, p)
        report["s1_threshold"] = threshold
    return report | {
        "s1_best_threshold_on_this_split": m.physionet_s1(y, p, m.s1_threshold(y, p)),
        "h": _with_interval(m.physionet_h, who, y, p),
    }


def _probability(
    table: dict[str, NDArray[Any]], task: str, rows: NDArray[np.bool_]
) -> dict[str, Any]:
    y, p, who = table[f"label_{task}"][rows], table[task][rows], table["subject"][rows]
    intercept, slope = m.calibration_line(y, p)
    return {
        "rows": int(rows.sum()),
        "positives": int(y.sum()),
        "auroc": _with_interval(m.auroc, who, y, p),
        "auprc": _with_interval(m.auprc, who, y, p),
        "brier": _with_interval(m.brier, who, y, p),
        "ece": _with_interval(m.calibration_error, who, y, p),
        "calibration_intercept": intercept,
        "calibration_slope": slope,
    }


def _with_interval(
    metric: Any, who: NDArray[Any], y: NDArray[Any], p: NDArray[Any]
) -> dict[str, float | None]:
    # Hourly tasks have many rows: fewer repeats give the interval to the digits that are shown.
    low, high = m.bootstrap(metric, who, y, p, repeats=1000 if len(y) < 20_000 else 200)
    values = {"value": float(metric(y, p)), "ci95_low": low, "ci95_high": high}
    # JSON has no NaN or infinity: a metric that is not defined on these rows is null.
    return {name: v if np.isfinite(v) else None for name, v in values.items()}
