"""The jobs of a sweep: which runs each cell of the table needs, and where they lie.

A run folder is named by the hash of its configuration, so what two rows or two tables have in
common is computed once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llm4ehr.model import Task
from training.config import FinetuneConfig, PretrainConfig, load_config
from training.sweep.config import Overrides, Row, SweepConfig, Target, as_settings
from training.sweep.smoke import smoke_finetune, smoke_pretrain

C = TypeVar("C", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One evaluation and the runs that it needs. `finetune` is None for interpretability."""

    row: Row
    target: Target
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    pretrain: PretrainConfig
    finetune: FinetuneConfig | None
    out: Path

    @property
    def metrics(self) -> Path:
        """What the job writes last."""
        return self.out / "metrics.json"


def plan(config: SweepConfig, *, smoke: bool = False) -> list[Job]:
    """All jobs in order. Optional targets whose store is not there are left out, and named."""
    jobs = []
    for target in config.targets:
        if target.optional and not target.test.store.exists():
            print(f"{target.test.store}: not found, {target.name} is left out", file=sys.stderr)
            continue
        for row in config.rows:
            jobs += _jobs(config, row, target, smoke)
    return jobs


def _jobs(config: SweepConfig, row: Row, target: Target, smoke: bool) -> list[Job]:
    heads: list[Task] = [task for task in config.tasks if task != "interpretability"]
    jobs = []
    if "interpretability" in config.tasks:
        pretraining = _pretraining(config, row, target, None, smoke)
        name = f"interpretability-{_digest([target.test.model_dump(mode='json'), config.seeds])}"
        jobs.append(
            Job(
                row=row, target=target, tasks=("interpretability",), seeds=config.seeds,
                pretrain=pretraining, finetune=None, out=pretraining.run / name,
            )
        )  # fmt: skip
    for seed in config.seeds:
        pretraining = _pretraining(config, row, target, seed, smoke)
        for tasks in [tuple(heads)] if config.joint else [(task,) for task in heads]:
            tuning = _finetuning(config, row, target, tasks, seed, pretraining, smoke)
            tested = [s.model_dump(mode="json") for s in (target.test, *target.threshold_on)]
            jobs.append(
                Job(
                    row=row, target=target, tasks=tasks, seeds=(seed,),
                    pretrain=pretraining, finetune=tuning,
                    out=tuning.run / f"test-{_digest(tested)}",
                )
            )  # fmt: skip
    return jobs


def _pretraining(
    config: SweepConfig, row: Row, target: Target, seed: int | None, smoke: bool
) -> PretrainConfig:
    overrides: Overrides = {"preset": config.preset} | target.pretrain | row.pretrain
    made = load_config(PretrainConfig, config.pretrain, as_settings(overrides))
    if config.rerun_pretraining and seed is not None:
        made = made.model_copy(update={"seed": seed})
    made = smoke_pretrain(made) if smoke else made
    return _named(made, config.runs, "pretrain")


def _finetuning(
    config: SweepConfig,
    row: Row,
    target: Target,
    tasks: Sequence[Task],
    seed: int,
    pretraining: PretrainConfig,
    smoke: bool,
) -> FinetuneConfig:
    overrides: Overrides = {"preset": config.preset} | target.finetune | row.finetune
    overrides |= {"seed": seed, "pretrained": str(pretraining.run)}
    made = load_config(FinetuneConfig, config.finetune, as_settings(overrides))
    # Not as an override, which would add to the tasks of the file.
    chosen = {task: made.tasks.get(task, 1.0) for task in tasks}
    made = FinetuneConfig.model_validate(made.model_dump() | {"tasks": chosen})
    made = smoke_finetune(made) if smoke else made
    return _named(made, config.runs, "finetune")


def _named(config: C, runs: Path, kind: str) -> C:
    """The configuration with a run folder of its own, named by all that its result depends on."""
    data = config.data.model_copy(update={"cache": runs / "cache"})
    body = config.model_dump(mode="json", exclude={"run", "trackers"})
    body["data"].pop("cache")
    if "pretrained" in body:  # where the runs lie is no matter
        body["pretrained"] = Path(body["pretrained"]).name
    run = runs / f"{kind}-{_digest(body)}"
    return config.model_copy(update={"run": run, "data": data})


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]
