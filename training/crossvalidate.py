"""Out-of-fold metrics: fine-tune once for each patient fold, score each stay by the model that has
not seen its label."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from training.config import FinetuneConfig
from training.dataset import open_sources, subject_fold
from training.evaluate import hourly_table, load_scorer, pooled, task_metrics
from training.finetune import finetune


def crossvalidate(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune for every fold and pool the held-out answers; writes crossvalidation.json.

    No weight has seen the label of a stay that it scores. The held-out stays do choose the best
    epoch, the calibration and the decision threshold of their fold, so the figures are slightly
    optimistic.
    """
    tables, thresholds = [], []
    for fold in range(config.data.n_folds):
        run = config.run / f"fold{fold}"
        data = config.data.model_copy(update={"validation_fold": fold})
        one = config.model_copy(update={"run": run, "data": data})
        finetune(one)
        scorer = load_scorer(run)
        thresholds.append(scorer.thresholds)
        for source in open_sources(config.data.sources, training=True):
            table = hourly_table(scorer, source)
            fold_of = {s: subject_fold(s, config.data.n_folds) for s in np.unique(table["subject"])}
            held_out = np.array([fold_of[s] == fold for s in table["subject"]], dtype=bool)
            tables.append({name: column[held_out] for name, column in table.items()})
    # A fold without a certain label of a task has no threshold for it.
    mean = {
        task: float(np.mean([of[task] for of in thresholds if task in of]))
        for task in sorted(set().union(*thresholds))
    }
    tasks = task_metrics(pooled(tables), mean, scorer.phenotypes)
    report = {"folds": config.data.n_folds, "tasks": tasks}
    (config.run / "crossvalidation.json").write_text(json.dumps(report, indent=2))
    return report
