"""Answers and labels of stays as columns, one row an episode-hour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm4ehr.model import Task
from llm4ehr.offline import score_episodes
from training.data.phenotypes import PHENOTYPES
from training.dataset import LABEL_COLUMNS, Batch, build_features
from training.evaluation.report import MORTALITY_HOUR
from training.evaluation.scorer import Scorer
from training.heads import predict
from training.labels import phenotype_flags, record_labels
from training.loop import device
from training.progress import track
from training.readout import TaskModule
from training.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Raw outputs and labels of one stay, T hours."""

    episode: str
    subject: str
    raw: Mapping[Task, NDArray[np.float32]]  # [T, n]
    hourly: NDArray[np.float32]  # [T, 3] labels, columns LABEL_COLUMNS
    phenotypes: NDArray[np.float32]  # [25]


def hourly_table(scorer: Scorer, source: Source) -> dict[str, NDArray[Any]]:
    """Answers and labels as columns, one row an episode-hour.

    `phenotyping` and `label_phenotyping` are [rows, labels of the head]; everything else is [rows].
    `last` is true at the last hour that is read of a stay, `read_mortality` where mortality is
    judged. What is answered once a stay is NaN before the last hour; what is asked once a patch has
    a label at the last hour of the patch alone. Hours of the remaining stay are at least 0, but in
    `remaining_los_unclipped`; `remaining_los_low` and `_high` bound them where there are intervals.
    """
    scored = _scored_hourly if scorer.readout.deployable else _read_out
    parts: dict[str, list[NDArray[Any]]] = {}
    for stay in scored(scorer, source):
        for name, column in _columns(scorer, source, stay).items():
            parts.setdefault(name, []).append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _scored_hourly(scorer: Scorer, source: Source) -> Iterator[_Scored]:
    """Through `llm4ehr.offline`, the same road as batch jobs of the service."""
    for block in track(source.store.blocks(), f"scoring {source.name}", source.store.n_blocks):
        records = [r for r in block if r.episode.episode_id in source.episode_ids]
        episodes = [scorer.as_read(record.episode) for record in records]
        answers = score_episodes(scorer.network, episodes)
        for record, scores in zip(records, answers, strict=True):
            labels = record_labels(record, len(scores.hidden), scorer.label_options)
            columns = [labels.decompensation, labels.mortality, labels.remaining_los]
            yield _Scored(
                episode=source.key(record.episode.episode_id),
                subject=source.key(record.subject_id),
                raw=scores.raw,
                hourly=np.stack(columns, axis=1),
                phenotypes=phenotype_flags(record.outcome),
            )


def _read_out(scorer: Scorer, source: Source) -> Iterator[_Scored]:
    """As fine-tuning selects: for the read-outs of the paper's tables, which nobody serves."""
    network, options = scorer.network, scorer.readout
    model = network.model.to(device())
    features = build_features(
        [source],
        network.preprocessing,
        network.vocabulary,
        scorer.cache,
        scorer.label_options,
        options.max_hours,
    )

    def load(index: NDArray[np.int64]) -> Batch:
        return features.batch(index, model.max_tokens).to(device())

    everyone = np.arange(len(features))
    outputs, targets = predict(TaskModule(model, options), options, load, everyone, "fp32")
    stay = targets.stay.numpy()
    starts = np.searchsorted(stay, np.arange(len(features) + 1))
    for i in everyone:
        rows = slice(starts[i], starts[i + 1])
        raw = {task: out[rows].numpy().copy() for task, out in outputs.items()}
        for task in options.per_stay.keys() & raw.keys():
            raw[task][:-1] = np.nan
        yield _Scored(
            episode=source.key(features.episode_ids[i]),
            subject=features.subjects[i],
            raw=raw,
            hourly=targets.hourly[rows].numpy(),
            phenotypes=targets.phenotypes[i].numpy(),
        )


def _columns(scorer: Scorer, source: Source, stay: _Scored) -> dict[str, NDArray[Any]]:
    n = len(stay.hourly)
    hours = np.arange(n)
    order = [PHENOTYPES.index(name) for name in scorer.phenotypes]
    labels: dict[Task, NDArray[np.float32]] = dict(zip(LABEL_COLUMNS, stay.hourly.T, strict=True))
    labels["phenotyping"] = np.tile(stay.phenotypes[order], (n, 1))
    last = hours == n - 1
    once = "mortality" in scorer.readout.per_stay
    columns: dict[str, NDArray[Any]] = {
        "episode": np.full(n, stay.episode),
        "subject": np.full(n, stay.subject),
        "hour": hours,
        "last": last,
        "read_mortality": last if once else hours == MORTALITY_HOUR,
    }
    for task, label in labels.items():
        columns[f"label_{task}"] = label if source.labels_taken(task) else label * np.nan
    for task, raw in stay.raw.items():
        answer = scorer.calibration[task](raw, hours)
        columns[task] = answer if task == "phenotyping" else answer[:, 0]
    if "mortality" in stay.raw:
        x = stay.raw["mortality"][:, 0].astype(np.float64)
        columns["mortality_uncalibrated"] = 1 / (1 + np.exp(-x))
    if "remaining_los" in stay.raw:
        x = stay.raw["remaining_los"][:, 0].astype(np.float64)
        los = scorer.calibration["remaining_los"]
        columns["remaining_los_unclipped"] = 24 * (np.expm1(x) if los.kind == "log_days" else x)
        if los.interval is not None:
            bounds = los.bounds(stay.raw["remaining_los"], hours)
            columns["remaining_los_low"], columns["remaining_los_high"] = (b[:, 0] for b in bounds)
    return columns


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
