"""A store of a few stays, written row by row, for the tests of the report and of its gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm4ehr.store import CodeInfo, StoreInfo, StoreWriter
from llm4ehr.store_tables import SCHEMAS

CODES = {
    "LOINC/2160-0": CodeInfo("creatinine in serum or plasma", "mg/dL"),
    "X/start": CodeInfo("infusion started", None),
}


def stay(episode_id: str, **known: Any) -> dict[str, Any]:
    """A row of `episodes.parquet`; the patient is `p-<id>` and the split "train" unless told."""
    row = dict.fromkeys(SCHEMAS["episodes.parquet"].names)
    return row | {
        "episode_id": episode_id,
        "subject_id": f"p-{episode_id}",
        "split": "train",
        "n_hours": 10,
        **known,
    }


def died(at: float) -> dict[str, Any]:
    """The outcome of a stay whose patient died at a known time."""
    return {
        "mortality": True,
        "death_hours_low": at,
        "death_hours_high": float(np.nextafter(at, np.inf)),
    }


def write_store(
    path: Path,
    stays: Sequence[dict[str, Any]],
    observations: Sequence[tuple[Any, ...]] = (),
    events: Sequence[tuple[Any, ...]] = (),
    *,
    refused: Mapping[str, int] | None = None,
    repaired: Mapping[str, int] | None = None,
    codes: Mapping[str, CodeInfo] | None = None,
    stays_per_group: int = 2,
    **about: Any,
) -> Path:
    """Write a store in row groups of a few stays.

    `observations`: (stay, variable, hours, available_hours, value[, priority]). `events`: (stay,
    code, hours, available_hours, value). `about` changes the description.
    """
    info = StoreInfo(
        **{
            "source": "synthetic",
            "licence": "CC0-1.0",
            "citation": "nobody",
            "created_by": "a test",
            "label_notes": {},
        }
        | about
    )
    with StoreWriter(path, info) as writer:
        for k in range(0, len(stays), stays_per_group):
            block = stays[k : k + stays_per_group]
            writer.add_block(
                pa.Table.from_pylist(block, schema=SCHEMAS["episodes.parquet"]),
                _items("observations.parquet", block, [(*o, 0)[:6] for o in observations]),
                _items("events.parquet", block, events),
                codes or CODES,
            )
        writer.close(refused=refused, repaired=repaired)
    return path


def _items(name: str, block: Sequence[dict[str, Any]], items: Sequence[tuple]) -> pa.Table:
    schema = SCHEMAS[name]
    rows = [
        dict(zip(schema.names, item, strict=True))
        for row in block
        for item in items
        if item[0] == row["episode_id"]
    ]
    plain = pa.schema(
        [(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    )
    return pa.Table.from_pylist(rows, schema=plain).cast(schema)
