"""From relational tables to an episode store: scan each big table once, then build by block.

A reader (MIMIC, eICU, MEDS, a unit's own tables) says which stays there are, which rows of each
table it keeps, and what those rows mean. Everything else happens here, the same for all: tables are
streamed in chunks and what is kept is spilled to disk, sorted by block of stays, so memory does not
grow with the tables; a run that was stopped goes on after the last spilled part; each block of
stays then becomes one row group of the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from llm4ehr.store import StoreInfo
from training.data.sources import Tally


@dataclass(frozen=True, slots=True)
class Step:
    """A rule of the cohort and what it left, beside the count of stays that was published."""

    rule: str
    stays: int
    subjects: int
    published_stays: int | None = None


@dataclass(frozen=True, slots=True)
class Cohort:
    """The stays of an extraction.

    `stays` has one row a stay, sorted by `episode_id` as text: the columns of `episodes.parquet`,
    `end_hours` (where the record ends) and private ones, named `_...`, that scans join on.
    """

    stays: pl.DataFrame
    waterfall: tuple[Step, ...]


class Table(Protocol):
    """A table too large to be held: rows come in chunks."""

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""

    @property
    def size(self) -> int:
        """Bytes on disk, for the progress bar."""

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """The rows after the first `start` ones, in their order."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a table; `first_line` is the line of the file with its first row."""

    frame: pl.DataFrame
    first_line: int
    bytes_read: int  # of the file on disk, up to the end of this chunk; may be an estimate


@dataclass(frozen=True, slots=True)
class Scan:
    """One pass over a table. `select` maps a chunk to the rows to keep.

    Its result has the Int32 column `stay`, a row number of `Cohort.stays`, and the same columns and
    types for every chunk.
    """

    name: str
    table: Table
    select: Callable[[pl.DataFrame, Tally], pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Items:
    """What happened in the stays of a block.

    `observations`: stay, variable, hours, available_hours, value, priority. `events`: stay, code,
    hours, available_hours, value. `codes`: code, descriptor, unit. Times are hours since admission.
    """

    observations: pl.DataFrame
    events: pl.DataFrame
    codes: pl.DataFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a sound extraction of a source has, and published figures to compare it with.

    `absent_variables` are never in the source; `tasks` are labelled by it. `published` maps a
    figure of the report to its published value.
    """

    absent_variables: frozenset[str] = frozenset()
    tasks: frozenset[str] = frozenset()
    published: Mapping[str, float] = field(default_factory=dict)


class TableReader(Protocol):
    """A data set of relational tables found at its source."""

    info: StoreInfo
    limits: bool  # whether values beyond the hard limits of a variable are refused
    expected: Expected

    def cohort(self, tally: Tally) -> Cohort:
        """The stays, from tables that fit in memory."""

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """The tables to pass over."""

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """Observations and events of a block of stays from what each scan kept of them."""


SPLITS = (("pretrain", 0.7), ("finetune", 0.9), ("test", 1.0))


def split_by_subject(dataset: str, subject_ids: pl.Series) -> pl.Series:
    """Split of each subject: pretrain 70 %, finetune 20 %, test 10 %, by a hash of its id."""

    def split(subject: str) -> str:
        digest = hashlib.sha256(f"{dataset}/{subject}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return next(name for name, upper in SPLITS if share < upper)

    unique = subject_ids.unique()
    of = {subject: split(subject) for subject in unique.to_list()}
    return subject_ids.replace_strict(of, return_dtype=pl.String).alias("split")


def exact_death(hours: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """`death_hours_low` and `death_hours_high` of a death at a known time (null: no death)."""

    def next_float(column: pl.Series) -> pl.Series:
        return pl.Series(np.nextafter(column.to_numpy(), np.inf), dtype=pl.Float64)

    return (
        hours.alias("death_hours_low"),
        hours.map_batches(next_float, return_dtype=pl.Float64)
        .fill_nan(None)
        .alias("death_hours_high"),
    )
