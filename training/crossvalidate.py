"""Out-of-fold metrics: fine-tune once for each patient fold, score each stay by the model that has
not seen its label."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from training.config import FinetuneConfig
from training.evaluation.evaluate import load_scorer
from training.evaluation.report import task_metrics
from training.evaluation.table import hourly_table, pooled
from training.finetune import finetune
from training.sources import fold_of, open_sources


def crossvalidate(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune for every fold and pool the held-out answers; writes crossvalidation.json.

    No weight has seen the label of a stay that it scores. The held-out stays do choose the best
    epoch, the calibration and the decision threshold of their fold, so the figures are slightly
    optimistic. Raises ValueError if there are fewer than two folds.
    """
    if config.data.n_folds < 2:
        raise ValueError("data.n_folds must be at least 2: with one fold nothing is left to train")
    tables, thresholds = [], []
    for fold in range(config.data.n_folds):
        run = config.run / f"fold{fold}"
        data = config.data.model_copy(update={"validation_fold": fold})
        one = config.model_copy(update={"run": run, "data": data})
        finetune(one)
        scorer = load_scorer(run)
        thresholds.append(scorer.thresholds)
        for source in open_sources(config.data.sources, training=True):
            held_out = fold_of(source, fold, config.data.n_folds)
            if held_out.episode_ids:
                tables.append(hourly_table(scorer, held_out))
    # A fold without a certain label of a task has no threshold for it.
    mean = {
        task: float(np.mean([of[task] for of in thresholds if task in of]))
        for task in sorted(set().union(*thresholds))
    }
    tasks = task_metrics(pooled(tables), mean, scorer.phenotypes)
    report = {"folds": config.data.n_folds, "tasks": tasks}
    (config.run / "crossvalidation.json").write_text(json.dumps(report, indent=2))
    return report
