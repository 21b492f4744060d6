"""What a sweep is: one YAML names two base configurations, and what varies over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from llm4ehr.model import Task
from training.config import ConfigError, SourceConfig, Strict, load_config
from training.sweep.published import published

Overrides = dict[str, Any]  # "key.path" -> value, as `--set` has them


class Row(Strict):
    """A row of the table: a variant of the model. `published` is its name in the paper."""

    name: str
    published: str | None = None
    pretrain: Overrides = Field(default_factory=dict)
    finetune: Overrides = Field(default_factory=dict)


class Target(Strict):
    """A pair of data sets: pre-trained on `source`, fine-tuned and tested on `name`.

    From `threshold_on` come decision threshold and calibration of mortality: stays that are neither
    trained nor tested on. An `optional` target is left out where its store is not there.
    """

    name: str
    source: str
    test: SourceConfig
    threshold_on: tuple[SourceConfig, ...] = ()
    optional: bool = False
    pretrain: Overrides = Field(default_factory=dict)
    finetune: Overrides = Field(default_factory=dict)


class SweepConfig(Strict):
    """An experiment: every row on every target, task by task, once a seed.

    `pretrain` and `finetune` are configurations beside this file, read with `preset`; overrides of
    a target come before those of a row. The task "interpretability" trains no head: it clusters the
    patches of the test split, once a seed. `joint` trains one network for all tasks instead of one
    each. Pre-training has one seed, that of its configuration, unless `rerun_pretraining`. Without
    `keep_weights` a fine-tuned network is dropped once it is evaluated.
    """

    title: str
    table: int | None = None
    runs: Path = Path("runs/paper")
    pretrain: Path
    finetune: Path
    preset: Literal["paper", "causal", "public_code"] = "paper"
    seeds: tuple[NonNegativeInt, ...] = Field(default=tuple(range(10)), min_length=1)
    tasks: tuple[Task | Literal["interpretability"], ...] = Field(min_length=1)
    joint: bool = False
    rerun_pretraining: bool = False
    keep_weights: bool = True
    targets: tuple[Target, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_are_told_apart(self) -> Self:
        for what, names in (
            ("rows", [row.name for row in self.rows]),
            ("targets", [f"{t.source} to {t.name}" for t in self.targets]),
            ("seeds", self.seeds),
            ("tasks", self.tasks),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"two of the {what} are the same")
        return self

    @model_validator(mode="after")
    def _published_rows_exist(self) -> Self:
        if self.table is not None:
            known = {cell.row for cell in published(self.table)}
            for row in self.rows:
                if row.published is not None and row.published not in known:
                    raise ValueError(f"table {self.table} has no row {row.published!r}")
        return self


def load_sweep(path: Path, overrides: list[str] | None = None) -> SweepConfig:
    """Read a sweep; its base configurations are named relative to its own folder.

    Raises ConfigError that names the file and every wrong key.
    """
    config = load_config(SweepConfig, path, overrides)
    bases = {name: path.parent / getattr(config, name) for name in ("pretrain", "finetune")}
    for base in bases.values():
        if not base.is_file():
            raise ConfigError(f"{path}: the base configuration {base} is not there")
    return config.model_copy(update=bases)


def as_settings(overrides: Overrides) -> list[str]:
    """Overrides in the form of `--set`. JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
