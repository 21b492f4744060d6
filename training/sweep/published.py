"""Numbers of the LLM4EHR rows in the paper's tables; docs/experiments.md names their oddities.

`published.json` has one entry a cell: mean and standard deviation over ten runs. The cells of
PhysioNet 2012 have mean and best of the runs instead, those of Table 11 a single value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One printed cell. `source` is the data set of pre-training, `target` that of the task."""

    table: int
    source: str
    target: str
    row: str
    task: str
    metric: str
    mean: float
    std: float | None = None
    best: float | None = None


def published(table: int) -> list[Published]:
    """The cells of a table. Raises ValueError for a table without a row of LLM4EHR."""
    cells = [Published(**cell) for cell in json.loads(_FILE.read_text()) if cell["table"] == table]
    if not cells:
        raise ValueError(f"table {table} of the paper has no numbers of LLM4EHR")
    return cells
