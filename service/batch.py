"""Batch scoring: every hour of every episode of a store, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm4ehr.bundle import Bundle
from llm4ehr.calibration import Interval
from llm4ehr.offline import EpisodeScores, score_episodes
from llm4ehr.store import EpisodeStore

_COLUMNS = {
    "decompensation": "decompensation",
    "mortality": "mortality",
    "remaining_los": "remaining_los_hours",
}


def score_store(data: Path, out: Path, bundle: Bundle, *, embeddings: bool = False) -> int:
    """Score a store into one Parquet file, one row an episode-hour; returns the number of rows.

    Columns: `episode_id`, `hour`, then `decompensation`, `mortality`, `remaining_los_hours`,
    `remaining_los_low_hours` and `remaining_los_high_hours` (the interval), `phenotype_<name>` as
    the bundle has them and, if asked for, `embedding`. Model name, version, digests and the
    coverage of the interval stand in the file's metadata. Labels are not needed. Memory holds one
    block of the store at a time. The file appears only when complete. Raises StoreError, OSError.
    """
    store = EpisodeStore.open(data)
    schema = _schema(bundle, embeddings)
    partial = out.with_name(out.name + ".partial")
    n_rows = 0
    with (
        Progress(
            TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as bar,
        pq.ParquetWriter(partial, schema) as writer,
    ):
        task = bar.add_task("scoring", total=store.n_episodes)
        for block in store.blocks():
            episodes = [record.episode for record in block]
            tables = [
                _table(scores, bundle, schema, embeddings)
                for scores in score_episodes(bundle.network, episodes)
            ]
            table = pa.concat_tables(tables)
            writer.write_table(table)
            n_rows += table.num_rows
            bar.advance(task, len(block))
    partial.replace(out)
    return n_rows


def _schema(bundle: Bundle, embeddings: bool) -> pa.Schema:
    heads = bundle.network.model.config.heads
    fields = [pa.field("episode_id", pa.string()), pa.field("hour", pa.int16())]
    fields += [pa.field(name, pa.float32()) for task, name in _COLUMNS.items() if task in heads]
    interval = _interval(bundle)
    if interval is not None:
        fields += [pa.field(f"remaining_los_{end}_hours", pa.float32()) for end in ("low", "high")]
    fields += [pa.field(f"phenotype_{name}", pa.float32()) for name in bundle.phenotypes]
    if embeddings:
        hidden = bundle.network.model.state_size
        fields.append(pa.field("embedding", pa.list_(pa.float32(), hidden)))
    provenance: dict[str, str | int | float] = {
        "model": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "preprocessing_digest": bundle.network.preprocessing_digest,
    }
    if interval is not None:
        provenance["interval_coverage"] = interval.coverage
    return pa.schema(fields, metadata={"llm4ehr": json.dumps(provenance)})


def _interval(bundle: Bundle) -> Interval | None:
    los = bundle.calibration.get("remaining_los")
    return None if los is None else los.interval


def _table(scores: EpisodeScores, bundle: Bundle, schema: pa.Schema, embeddings: bool) -> pa.Table:
    n = len(scores.hidden)
    answers = scores.answers(bundle.calibration)
    columns: list[pa.Array] = [
        pa.array([scores.episode_id] * n, pa.string()),
        pa.array(np.arange(n), pa.int16()),
    ]
    for task in _COLUMNS:
        if task in answers:
            columns.append(pa.array(answers[task][:, 0].astype(np.float32)))
    if _interval(bundle):
        raw = scores.raw["remaining_los"]
        for end in bundle.calibration["remaining_los"].bounds(raw, np.arange(n)):
            columns.append(pa.array(end[:, 0].astype(np.float32)))
    if "phenotyping" in answers:
        columns += [pa.array(column.astype(np.float32)) for column in answers["phenotyping"].T]
    if embeddings:
        flat = pa.array(scores.hidden.reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, scores.hidden.shape[1]))
    return pa.Table.from_arrays(columns, schema=schema)
