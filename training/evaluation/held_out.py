"""What a fine-tuning run says of the stays that it held out: metrics, predictions, pictures.

These stays chose the epoch, the calibration and the thresholds, so the figures flatter a little; a
test split is for `training.evaluation.evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm4ehr.bundle import Network
from llm4ehr.calibration import calibration_from_json
from training.config import FinetuneConfig
from training.data.phenotypes import PHENOTYPES
from training.evaluation.pictures import draw_pictures
from training.evaluation.report import task_metrics
from training.evaluation.scorer import Scorer
from training.evaluation.table import flat, hourly_table, pooled
from training.readout import ReadoutOptions
from training.sources import Source, fold_of


def write_held_out(
    folder: Path,
    config: FinetuneConfig,
    sources: Sequence[Source],
    network: Network,
    fitted: Mapping[str, Any],
) -> None:
    """Score the held-out fold with the calibration `fitted` on it; write metrics.json,
    predictions.parquet, and a PNG of the curves and the calibration of each task."""
    scorer = Scorer(
        network=network,
        calibration=calibration_from_json(fitted["calibration"]),
        thresholds=fitted["thresholds"],
        phenotypes=PHENOTYPES if "phenotyping" in config.tasks else (),
        label_options=config.label_options,
        readout=ReadoutOptions.of(config, network.model.config.patch_hours),
        cache=config.data.cache,
    )
    fold = config.data.validation_fold
    held_out = [
        fold_of(source, fold, config.data.n_folds) for source in sources if fold is not None
    ]
    table = pooled([hourly_table(scorer, source) for source in held_out if source.episode_ids])
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(flat(table, scorer.phenotypes)), folder / "predictions.parquet")
    draw_pictures(folder, table, scorer)
    report = task_metrics(table, scorer.thresholds, scorer.phenotypes, intervals=False)
    (folder / "metrics.json").write_text(json.dumps(report, indent=2))
