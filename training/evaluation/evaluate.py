"""Score splits of episode stores and say how good the answers are.

Scoring goes through `llm4ehr.offline`, the same road as batch jobs of the service.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llm4ehr.bundle import load_bundle, load_network
from llm4ehr.calibration import calibration_from_json
from llm4ehr.model import Task
from training.config import FinetuneConfig, SourceConfig
from training.data.phenotypes import PHENOTYPES
from training.evaluation.facts import facts
from training.evaluation.pictures import draw_pictures
from training.evaluation.report import task_metrics
from training.evaluation.scorer import Scorer
from training.evaluation.table import flat, hourly_table, pooled
from training.evaluation.threshold import with_threshold
from training.labels import MIN_HISTORY_HOURS, LabelOptions
from training.loop import device
from training.readout import ReadoutOptions
from training.run_folder import environment
from training.sources import Source, is_another, open_sources


def evaluate(
    model: Path,
    stores: Sequence[Path],
    splits: Sequence[str],
    out: Path | None = None,
    *,
    labels: Sequence[Task] | None = None,
    split_column: Literal["split", "benchmark_split"] = "split",
    max_episodes: int | None = None,
    threshold_on: Sequence[SourceConfig] = (),
    intervals: bool = True,
) -> dict[str, Any]:
    """Metrics of a bundle or fine-tuning run on splits of stores, with 95 % bootstrap intervals.

    Stays of several stores are pooled, and `by_source` has each store alone. `labels` are the tasks
    to judge (None: all that the stores label); of each store at most `max_episodes` stays are read.
    From `threshold_on`, other stays, come the decision threshold and the calibration of mortality,
    instead of from the stays that the run held out. Writes metrics.json, predictions.parquet and
    pictures of the curves and of the calibration to `out` if given. Raises ValueError when a store
    has no such stays, or when stores cannot be told apart.
    """
    scorer = load_scorer(model)
    scorer.network.model.to(device())
    chosen = {"splits": splits, "labels": labels, "split_column": split_column}
    opened = open_sources(
        [
            SourceConfig.model_validate({"store": store, "max_episodes": max_episodes, **chosen})
            for store in stores
        ],
        training=False,
    )
    if threshold_on:
        scorer = with_threshold(scorer, open_sources(threshold_on, training=False), opened)
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
                *(
                    f"--threshold-on {of.store} {split}"
                    for of in threshold_on
                    for split in of.splits
                ),
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
        "facts": facts(model, scorer, np.unique(table["episode"])),
        "seed_of_bootstrap": 0,
        "tasks": task_metrics(table, scorer.thresholds, scorer.phenotypes, intervals=intervals),
        "environment": environment(),
    }
    if len(opened) > 1:
        report["by_source"] = {
            source.name: task_metrics(
                part, scorer.thresholds, scorer.phenotypes, intervals=intervals
            )
            for source, part in zip(opened, tables, strict=True)
        }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(flat(table, scorer.phenotypes)), out / "predictions.parquet")
        draw_pictures(out, table, scorer)
        # Written last: its presence says that the evaluation is complete.
        (out / "metrics.json").write_text(json.dumps(report, indent=2))
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
    result = json.loads((model / "result.json").read_text())
    config = FinetuneConfig.model_validate_json((model / "finetune.json").read_text())
    return Scorer(
        network=network,
        calibration=calibration_from_json(result["calibration"]),
        thresholds=result["thresholds"],
        phenotypes=PHENOTYPES if "phenotyping" in heads else (),
        label_options=config.label_options,
        readout=ReadoutOptions.of(config, network.model.config.patch_hours),
        cache=config.data.cache,
    )


def _label_options(body: Mapping[str, Any]) -> LabelOptions:
    # Bundles of the first format version do not say how much history their labels ask for.
    history = body.get("min_history_hours", MIN_HISTORY_HOURS)
    return LabelOptions(align=body["label_align"], min_history_hours=history)
