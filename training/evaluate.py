"""Score splits of episode stores and say how good the answers are.

Scoring goes through `llm4ehr.offline`, the same road as batch jobs of the service.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llm4ehr.bundle import Network, load_bundle, load_network
from llm4ehr.calibration import Calibration, OutputMap, default_calibration
from llm4ehr.model import Task
from llm4ehr.offline import score_episodes
from training import metrics as m
from training.config import SourceConfig
from training.data.phenotypes import PHENOTYPES
from training.labels import (
    MIN_HISTORY_HOURS,
    LabelOptions,
    certain,
    phenotype_flags,
    record_labels,
)
from training.loop import environment
from training.progress import track
from training.sources import Source, is_another, open_sources

# The 2012 challenge predicts from the first 48 hours; hour bin 47 is the last of them.
MORTALITY_HOUR = 47
# Phenotypes are judged at the end of a stay; the end of the first day shows what is known early.
DIAGNOSTIC_HOUR = 23


def evaluate(
    model: Path,
    stores: Sequence[Path],
    splits: Sequence[str],
    out: Path | None = None,
    *,
    labels: Sequence[Task] | None = None,
    split_column: Literal["split", "benchmark_split"] = "split",
    max_episodes: int | None = None,
) -> dict[str, Any]:
    """Metrics of a bundle or fine-tuning run on splits of stores, with 95 % bootstrap intervals.

    Stays of several stores are pooled, and `by_source` has each store alone. `labels` are the tasks
    to judge (None: all that the stores label); of each store at most `max_episodes` stays are read.
    Writes metrics.json and predictions.parquet to `out` if given. Raises ValueError when a store
    has no such stays, or when stores cannot be told apart.
    """
    scorer = load_scorer(model)
    chosen = {"splits": splits, "labels": labels, "split_column": split_column}
    opened = open_sources(
        [
            SourceConfig.model_validate({"store": store, "max_episodes": max_episodes, **chosen})
            for store in stores
        ],
        training=False,
    )
    tables = [hourly_table(scorer, source) for source in opened]
    table = pooled(tables)
    report = {
        "model": str(model),
        "command": " ".join(
            [
                f"python -m training evaluate {model}",
                *(f"--store {store}" for store in stores),
                *(f"--split {split}" for split in splits),
                *(f"--labels {task}" for task in labels or ()),
                *([f"--split-column {split_column}"] if split_column != "split" else []),
                *([f"--max-episodes {max_episodes}"] if max_episodes is not None else []),
            ]
        ),
        "splits": list(splits),
        "sources": [
            {
                "source": source.name,
                "episodes": len(np.unique(part["episode"])),
                "patients": len(np.unique(part["subject"])),
                "patients_trained_on": trained_on(model, source, part),
            }
            for source, part in zip(opened, tables, strict=True)
        ],
        "episodes": len(np.unique(table["episode"])),
        "seed_of_bootstrap": 0,
        "tasks": task_metrics(table, scorer.thresholds, scorer.phenotypes),
        "environment": environment(),
    }
    if len(opened) > 1:
        report["by_source"] = {
            source.name: task_metrics(part, scorer.thresholds, scorer.phenotypes)
            for source, part in zip(opened, tables, strict=True)
        }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(report, indent=2))
        pq.write_table(pa.table(flat(table, scorer.phenotypes)), out / "predictions.parquet")
    return report


def trained_on(model: Path, source: Source, table: Mapping[str, NDArray[Any]]) -> int | None:
    """Number of the patients whom a fine-tuning run was trained or selected on.

    None for a bundle, which does not say who they were, and for a store that has no name of its own
    where the run read another one without.
    """
    file = model / "subjects.json"
    if not file.exists():
        return None
    result = json.loads((model / "result.json").read_text())
    if is_another(source.store.info, result["stores"]):
        return None
    return len(set(json.loads(file.read_text())) & set(table["subject"].tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A network with all that is needed to turn its outputs into answers and judge them."""

    network: Network
    calibration: Calibration
    thresholds: dict[str, float]
    phenotypes: tuple[str, ...]  # outputs of the phenotyping head
    label_options: LabelOptions


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
            phenotypes=bundle.phenotypes,
            label_options=_label_options(bundle.labels),
        )
    network = load_network(model)
    heads = network.model.config.heads
    if not heads:
        raise ValueError(f"{model}: the network has no heads; name a fine-tuning run or a bundle")
    calibration = default_calibration(list(heads))
    result = json.loads((model / "result.json").read_text())
    for task, (a, b) in result["platt"].items():
        calibration[task] = OutputMap(kind="platt", a=a, b=b)
    return Scorer(
        network=network,
        calibration=calibration,
        thresholds=result["thresholds"],
        phenotypes=PHENOTYPES if "phenotyping" in heads else (),
        label_options=_label_options(json.loads((model / "finetune.json").read_text())),
    )


def _label_options(body: Mapping[str, Any]) -> LabelOptions:
    # Bundles of the first format version do not say how much history their labels ask for.
    history = body.get("min_history_hours", MIN_HISTORY_HOURS)
    return LabelOptions(align=body["label_align"], min_history_hours=history)


def hourly_table(scorer: Scorer, source: Source) -> dict[str, NDArray[Any]]:
    """Answers and labels as columns, one row an episode-hour.

    `phenotyping` and `label_phenotyping` are [rows, labels of the head]; everything else is [rows].
    `last` is true at the last hour of a stay.
    """
    order = [PHENOTYPES.index(name) for name in scorer.phenotypes]
    parts: dict[str, list[NDArray[Any]]] = {}
    for block in track(source.store.blocks(), f"scoring {source.name}", source.store.n_blocks):
        records = [r for r in block if r.episode.episode_id in source.episode_ids]
        scored = score_episodes(scorer.network, [r.episode for r in records])
        for record, scores in zip(records, scored, strict=True):
            n = len(scores.hidden)
            labels = record_labels(record, n, scorer.label_options)
            hourly: dict[Task, NDArray[np.float32]] = {
                "decompensation": labels.decompensation,
                "mortality": labels.mortality,
                "remaining_los": labels.remaining_los,
                "phenotyping": np.tile(phenotype_flags(record.outcome)[order], (n, 1)),
            }
            columns: dict[str, NDArray[Any]] = {
                "episode": np.full(n, source.key(record.episode.episode_id)),
                "subject": np.full(n, source.key(record.subject_id)),
                "hour": np.arange(n),
                "last": np.arange(n) == n - 1,
            }
            for task, label in hourly.items():
                columns[f"label_{task}"] = label if source.labels_taken(task) else label * np.nan
            for task, answer in scores.answers(scorer.calibration).items():
                columns[task] = answer if task == "phenotyping" else answer[:, 0]
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def pooled(tables: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Tables with the same columns one below the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def flat(table: Mapping[str, NDArray[Any]], phenotypes: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The table with one column a phenotype: `phenotype_NAME` and `label_phenotype_NAME`."""
    columns = {name: column for name, column in table.items() if column.ndim == 1}
    for i, name in enumerate(phenotypes):
        columns[f"phenotype_{name}"] = table["phenotyping"][:, i]
        columns[f"label_phenotype_{name}"] = table["label_phenotyping"][:, i]
    return columns


def task_metrics(
    table: dict[str, NDArray[Any]], thresholds: dict[str, float], phenotypes: Sequence[str] = ()
) -> dict[str, Any]:
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
    if "phenotyping" in table:
        coded = ~np.isnan(table["label_phenotyping"]).any(1)
        for name, at in (
            ("phenotyping", table["last"] & coded),
            ("phenotyping_at_24h", (table["hour"] == DIAGNOSTIC_HOUR) & coded),
        ):
            if at.any():
                report[name] = _phenotyping(table, at, phenotypes)
    return report


def _phenotyping(
    table: dict[str, NDArray[Any]], at: NDArray[np.bool_], names: Sequence[str]
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
        "auroc_macro": _with_interval(partial(m.macro, m.auroc), who, y, p, repeats=200),
        "auroc_micro": _with_interval(partial(m.micro, m.auroc), who, y, p, repeats=200),
        "auprc_macro": _with_interval(partial(m.macro, m.auprc), who, y, p, repeats=200),
        "brier": _with_interval(m.brier, who, y, p, repeats=200),
        "per_label": per_label,
    }


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
    metric: Any, who: NDArray[Any], y: NDArray[Any], p: NDArray[Any], repeats: int | None = None
) -> dict[str, float | None]:
    # Hourly tasks have many rows: fewer repeats give the interval to the digits that are shown.
    repeats = repeats or (1000 if len(y) < 20_000 else 200)
    low, high = m.bootstrap(metric, who, y, p, repeats=repeats)
    values = {"value": float(metric(y, p)), "ci95_low": low, "ci95_high": high}
    # JSON has no NaN or infinity: a metric that is not defined on these rows is null.
    return {name: v if np.isfinite(v) else None for name, v in values.items()}
