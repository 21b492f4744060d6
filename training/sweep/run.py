"""Run an experiment: every row on every target, task by task and seed by seed, into one table.

Finished runs are not repeated, so a stopped sweep goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.evaluation.evaluate import evaluate
from training.evaluation.interpret import interpret
from training.finetune import finetune
from training.pretrain import pretrain
from training.progress import progress_bar
from training.sweep.config import SweepConfig
from training.sweep.plan import Job, plan
from training.sweep.smoke import smoke_sweep
from training.sweep.table import make_table, markdown


def sweep(config: SweepConfig, out: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Run what is not finished yet; writes table.json and table.md to `out`, returns the table.

    With `smoke` everything is small, see `training.sweep.smoke`.
    """
    if smoke:
        config = smoke_sweep(config)
    jobs = plan(config, smoke=smoke)
    to_do = {job.out: job for job in jobs if not job.metrics.exists()}  # rows may share a run
    with progress_bar() as bar:
        task = bar.add_task(config.title, total=len(to_do), note="")
        for job in to_do.values():
            bar.update(task, note=f"{job.row.name}, {', '.join(job.tasks)}, seed {job.seeds[0]}")
            run(job, keep_weights=config.keep_weights)
            bar.advance(task)
    table = make_table(config, jobs, smoke=smoke)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(table, indent=2))
    (out / "table.md").write_text(markdown(table))
    return table


def run(job: Job, *, keep_weights: bool) -> None:
    """Pre-train and fine-tune as far as that is not done, and evaluate."""
    if not (job.pretrain.run / "result.json").exists():
        pretrain(job.pretrain)
    if job.finetune is None:
        interpret(job.pretrain.run, job.target.test, job.out, seeds=job.seeds)
        return
    folder = job.finetune.run
    if (folder / "result.json").exists() and not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder}: finished, but its weights were dropped; remove the folder")
    finetune(job.finetune)
    test = job.target.test
    evaluate(
        folder,
        [test.store],
        test.splits,
        job.out,
        labels=[t for t in job.finetune.tasks if test.labels is None or t in test.labels],
        split_column=test.split_column,
        max_episodes=test.max_episodes,
        threshold_on=job.target.threshold_on,
        intervals=False,  # the spread over the seeds is what is reported
    )
    if not keep_weights:
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
