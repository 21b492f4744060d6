"""Answers and labels of stays as columns, one row an episode-hour, scored by `llm4ehr.offline`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.model import Task
from llm4ehr.offline import EpisodeScores, score_episodes
from llm4ehr.store import EpisodeRecord
from training.data.phenotypes import PHENOTYPES
from training.evaluation.reading import patch_answers, patch_labels, stay_answer
from training.evaluation.report import MORTALITY_HOUR
from training.evaluation.scorer import Scorer
from training.labels import phenotype_flags, record_labels
from training.progress import track
from training.sources import Source


def hourly_table(scorer: Scorer, source: Source) -> dict[str, NDArray[Any]]:
    """Answers and labels as columns, one row an episode-hour.

    `phenotyping` and `label_phenotyping` are [rows, labels of the head]; everything else is [rows].
    `last` is true at the last hour that is read of a stay, `read_mortality` where mortality is
    judged. An answer is NaN where none is given: a task that is read out once a stay answers at its
    last hour, hourly tasks that are asked by patch at the last hour of every patch, where the label
    is that of the patch. Hours of the remaining stay are at least 0 but in
    `remaining_los_unclipped`.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    for block in track(source.store.blocks(), f"scoring {source.name}", source.store.n_blocks):
        records = [r for r in block if r.episode.episode_id in source.episode_ids]
        episodes = [scorer.as_read(r.episode) for r in records]
        scored = score_episodes(scorer.network, episodes)
        for record, scores in zip(records, scored, strict=True):
            columns = _identity(source, record, len(scores.hidden))
            columns |= _labels(scorer, source, record, len(scores.hidden))
            columns |= _answers(scorer, scores)
            columns["read_mortality"] = (
                columns["hour"] == MORTALITY_HOUR
                if scorer.reading.mortality == "hourly"
                else columns["last"]
            )
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _identity(source: Source, record: EpisodeRecord, n: int) -> dict[str, NDArray[Any]]:
    return {
        "episode": np.full(n, source.key(record.episode.episode_id)),
        "subject": np.full(n, source.key(record.subject_id)),
        "hour": np.arange(n),
        "last": np.arange(n) == n - 1,
    }


def _labels(
    scorer: Scorer, source: Source, record: EpisodeRecord, n: int
) -> dict[str, NDArray[Any]]:
    outcome, reading = record.outcome, scorer.reading
    made = record_labels(record, n, scorer.label_options)
    mortality = made.mortality
    if reading.mortality != "hourly" and outcome.mortality is not None:
        mortality = np.full(n, outcome.mortality, np.float32)
    stay = record.episode.n_hours if outcome.los_hours is None else outcome.los_hours
    if stay < reading.mortality_min_hours:
        mortality = np.full(n, np.nan, np.float32)
    decompensation, remaining_los = made.decompensation, made.remaining_los
    if reading.hourly_unit == "patch":
        decompensation = patch_labels(decompensation, scorer.patch_hours, "max")
        remaining_los = patch_labels(remaining_los, scorer.patch_hours, "min")
    order = [PHENOTYPES.index(name) for name in scorer.phenotypes]
    labels: dict[Task, NDArray[np.float32]] = {
        "decompensation": decompensation,
        "mortality": mortality,
        "remaining_los": remaining_los,
        "phenotyping": np.tile(phenotype_flags(outcome)[order], (n, 1)),
    }
    return {
        f"label_{task}": label if source.labels_taken(task) else label * np.nan
        for task, label in labels.items()
    }


def _answers(scorer: Scorer, scores: EpisodeScores) -> dict[str, NDArray[Any]]:
    raw = {task: _as_read(scorer, task, x) for task, x in scores.raw.items()}
    columns: dict[str, NDArray[Any]] = {
        task: answer if task == "phenotyping" else answer[:, 0]
        for task, answer in replace(scores, raw=raw).answers(scorer.calibration).items()
    }
    if "mortality" in raw:
        x = raw["mortality"][:, 0].astype(np.float64)
        columns["mortality_uncalibrated"] = 1 / (1 + np.exp(-x))
    if "remaining_los" in raw:
        x = raw["remaining_los"][:, 0].astype(np.float64)
        days = np.expm1(x) if scorer.calibration["remaining_los"].kind == "log_days" else x
        columns["remaining_los_unclipped"] = 24 * days
    return columns


def _as_read(scorer: Scorer, task: Task, raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Raw outputs [T, n] with NaN at the hours at which the task is not answered."""
    reading = scorer.reading
    if task in ("mortality", "phenotyping"):
        how = reading.mortality if task == "mortality" else reading.phenotyping
        return raw if how == "hourly" else stay_answer(raw, how)
    return raw if reading.hourly_unit == "hour" else patch_answers(raw, scorer.patch_hours)


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
