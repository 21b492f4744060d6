"""Labels of a store, and predictions for it, in the format of MEDS 0.4.

Rows carry the subject and a `prediction_time`: the last microsecond of the data that may be used,
on the calendar of `training.data.meds.calendar`. `stays.parquet` tells which stay was put where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llm4ehr.store import EpisodeRecord, EpisodeStore, StoreError
from training.data.meds.calendar import US_PER_HOUR, new_folder, places
from training.data.phenotypes import PHENOTYPES
from training.labels import DEFAULT_LABELS, LabelOptions, certain, phenotype_flags, record_labels

MORTALITY_HOUR = 48
"""Whole hours after admission at which mortality is asked, as the MIMIC-III benchmark does."""

_LABEL_TYPES = {"boolean_value": pa.bool_(), "float_value": pa.float32()}


def task_folder(phenotype: str) -> str:
    """Name of the task of a phenotype: `phenotype/` and its words in lower case."""
    return "phenotype/" + "_".join(re.findall(r"[a-z0-9]+", phenotype.lower()))


def write_labels(store: Path, out: Path, options: LabelOptions = DEFAULT_LABELS) -> dict[str, int]:
    """Labels of a store, one folder of `out` for each task; returns the number of labels of each.

    Tasks: `decompensation` and `remaining_los` (hours) at every hour at which they are asked,
    `mortality` once a stay after 48 hours, `phenotype/...` once a stay at the end of its record.
    `prediction_time` is the last microsecond of the hours that may be used. Labels that are not
    known, or only with a probability, are left out. Raises StoreError; also if `out` is in use.
    """
    opened = EpisodeStore.open(store)
    where = places(opened)
    counts = dict.fromkeys(_TASKS, 0)
    with new_folder(out) as folder:
        with ExitStack() as files:
            writers: dict[str, pq.ParquetWriter] = {}
            for task, column in _TASKS.items():
                (folder / task).mkdir(parents=True)
                path = folder / task / "labels.parquet"
                writers[task] = files.enter_context(pq.ParquetWriter(path, _label_schema(column)))
            for block in opened.blocks():
                for task, table in _block_labels(block, where, options).items():
                    writers[task].write_table(table)
                    counts[task] += table.num_rows
        where.write_parquet(folder / "stays.parquet")
    return counts


def write_predictions(
    predictions: Path, store: Path, out: Path, *, threshold: float = 0.5
) -> dict[str, int]:
    """Predictions with their labels, one file `out`/TASK.parquet for each task with yes or no.

    `predictions` is what `python -m service score` writes for that store. Rows are those of
    `write_labels`; the answer to a phenotype is that of the last hour that was scored. Columns as
    meds-evaluation wants them: `predicted_boolean_probability`, and `predicted_boolean_value` where
    the probability reaches `threshold`. Returns the number of rows of each task. Raises StoreError;
    also if `out` is in use, or nothing is predicted.
    """
    opened = EpisodeStore.open(store)
    where = places(opened)
    names = _names_in(predictions)
    columns = {task: name for task, name in _predicted_columns().items() if name in names}
    if not columns:
        raise StoreError(f"{predictions}: holds no predictions")
    counts = dict.fromkeys(columns, 0)
    with new_folder(out) as folder:
        with ExitStack() as files:
            writers: dict[str, pq.ParquetWriter] = {}
            for task in columns:
                path = folder / f"{task}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                writers[task] = files.enter_context(pq.ParquetWriter(path, _PREDICTIONS))
            for block in opened.blocks():
                labels = _block_labels(block, where, DEFAULT_LABELS)
                scored = _scores(predictions, block, where, list(columns.values()))
                for task, name in columns.items():
                    rows = _with_answers(pl.DataFrame(labels[task]), scored, task, name)
                    table = rows.select(
                        "subject_id",
                        "prediction_time",
                        "boolean_value",
                        predicted_boolean_value=pl.col("answer") >= threshold,
                        predicted_boolean_probability=pl.col("answer").cast(pl.Float32),
                    )
                    writers[task].write_table(table.to_arrow().cast(_PREDICTIONS))
                    counts[task] += len(table)
        where.write_parquet(folder / "stays.parquet")
    return counts


_TASKS: Mapping[str, str] = {
    "decompensation": "boolean_value",
    "mortality": "boolean_value",
    "remaining_los": "float_value",
    **{task_folder(name): "boolean_value" for name in PHENOTYPES},
}
"""Task -> column of its labels."""


def _label_schema(column: str) -> pa.Schema:
    return pa.schema(
        [
            pa.field("subject_id", pa.int64(), nullable=False),
            pa.field("prediction_time", pa.timestamp("us"), nullable=False),
            pa.field(column, _LABEL_TYPES[column], nullable=False),
        ]
    )


_PREDICTIONS = pa.schema(
    [
        *_label_schema("boolean_value"),
        pa.field("predicted_boolean_value", pa.bool_()),
        pa.field("predicted_boolean_probability", pa.float32()),
    ]
)


def _block_labels(
    block: list[EpisodeRecord], where: pl.DataFrame, options: LabelOptions
) -> dict[str, pa.Table]:
    """Labels of a block of stays by task."""
    ids = [record.episode.episode_id for record in block]
    at = pl.DataFrame({"episode_id": ids}).join(where, on="episode_id", maintain_order="left")
    subject = at["subject_id"].to_numpy()
    start = at["start"].cast(pl.Int64).to_numpy()  # microseconds
    n_hours = at["n_hours"].to_numpy()

    def table(
        column: str, stay: NDArray[np.int64], hour: NDArray[Any], value: NDArray[Any]
    ) -> pa.Table:
        """Labels `value` of stays (rows of the block) at the end of hour bins."""
        time = start[stay] + (hour.astype(np.int64) + 1) * US_PER_HOUR - 1
        arrays = [
            pa.array(subject[stay]),
            pa.array(time).cast(pa.timestamp("us")),
            pa.array(value).cast(_LABEL_TYPES[column]),
        ]
        return pa.Table.from_arrays(arrays, schema=_label_schema(column))

    hourly = [record_labels(r, n, options) for r, n in zip(block, n_hours.tolist(), strict=True)]
    stay = np.repeat(np.arange(len(block)), n_hours)
    hour = np.concatenate([np.arange(n) for n in n_hours])
    risk = np.concatenate([labels.decompensation for labels in hourly])
    death = np.concatenate([labels.mortality for labels in hourly])
    left = np.concatenate([labels.remaining_los for labels in hourly])
    known = certain(risk)
    asked = (hour == MORTALITY_HOUR - 1) & ~np.isnan(death)
    tables = {
        "decompensation": table("boolean_value", stay[known], hour[known], risk[known] == 1),
        "mortality": table("boolean_value", stay[asked], hour[asked], death[asked] == 1),
        "remaining_los": table(
            "float_value", stay[~np.isnan(left)], hour[~np.isnan(left)], left[~np.isnan(left)]
        ),
    }
    flags = np.stack([phenotype_flags(record.outcome) for record in block])
    coded = np.flatnonzero(~np.isnan(flags[:, 0]))
    for k, name in enumerate(PHENOTYPES):
        tables[task_folder(name)] = table(
            "boolean_value", coded, n_hours[coded] - 1, flags[coded, k] == 1
        )
    return tables


def _predicted_columns() -> dict[str, str]:
    """Task with yes or no -> column of a file of predictions."""
    return {"decompensation": "decompensation", "mortality": "mortality"} | {
        task_folder(name): f"phenotype_{name}" for name in PHENOTYPES
    }


def _names_in(predictions: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(predictions).names
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{predictions}: not readable as Parquet: {error}") from error
    if not {"episode_id", "hour"} <= set(names):
        raise StoreError(f"{predictions}: there is no column episode_id or no column hour")
    return names


def _scores(
    predictions: Path, block: list[EpisodeRecord], where: pl.DataFrame, columns: list[str]
) -> pl.DataFrame:
    """Predictions for a block of stays with subject, `prediction_time` and end of the record."""
    ids = [record.episode.episode_id for record in block]
    scored = (
        pl.scan_parquet(predictions)
        .filter(pl.col("episode_id").is_in(ids))
        .select("episode_id", "hour", *columns)
        .collect()
    )
    hours = pl.col("hour").cast(pl.Int64) + 1
    return scored.join(where, on="episode_id").with_columns(
        prediction_time=pl.col("start") + pl.duration(hours=hours, microseconds=-1),
        _end=pl.col("start") + pl.duration(hours="n_hours", microseconds=-1),
    )


def _with_answers(
    labels: pl.DataFrame, scored: pl.DataFrame, task: str, column: str
) -> pl.DataFrame:
    """Labels that have an answer, with it: that of the same hour, or for phenotypes the last."""
    key = ["subject_id", "prediction_time"]
    if task.startswith("phenotype/"):
        last = scored.sort("hour").unique("episode_id", keep="last")
        scored = last.with_columns(prediction_time="_end")
    answers = scored.select(*key, answer=column).drop_nulls()
    return labels.join(answers, on=key, maintain_order="left")
