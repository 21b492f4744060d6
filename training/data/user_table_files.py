"""Files of a unit's own tables: their layout, and their rows as text with line numbers.

Everything is read as text, so that a cell which cannot be read refuses its row and not its file.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from training.data.csv_table import CsvTable
from training.data.extraction import Chunk
from training.data.parquet_table import ParquetTable
from training.data.sources import SourceError
from training.data.user_table_check import trimmed


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of a table. A file has the times of one of `clocks`, and all of those required."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    clocks: tuple[tuple[str, ...], ...] = ()  # the first column of each is required with it
    needed: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that a file may have."""
        return (*self.required, *self.optional, *(c for clock in self.clocks for c in clock))


LAYOUTS: Mapping[str, Layout] = {
    "stays": Layout(
        ("episode_id", "subject_id"),
        ("split", "age_years", "sex", "unit_type", "height_cm", "weight_kg", "mortality"),
        (
            ("admission_time", "discharge_time", "death_time"),
            ("end_hours", "los_hours", "death_hours"),
        ),
        needed=True,
    ),
    "observations": Layout(
        ("episode_id", "variable", "value"),
        ("unit", "priority"),
        (("time", "available_time"), ("hours", "available_hours")),
        needed=True,
    ),
    "events": Layout(
        ("episode_id", "code"),
        ("value", "unit", "descriptor"),
        (("time", "end_time", "available_time"), ("hours", "end_hours", "available_hours")),
    ),
    "diagnoses": Layout(("episode_id", "icd_version", "icd_code")),
    "codes": Layout(("code", "descriptor"), ("unit",)),
}


class Lines:
    """A table all of text, trimmed, with the line (or row of a Parquet file) in column `line`."""

    def __init__(self, table: CsvTable | ParquetTable, header: Sequence[str]) -> None:
        self._table = table
        self.header = frozenset(header)

    @property
    def path(self) -> Path:
        """The file."""
        return self._table.path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._table.size

    @property
    def moments(self) -> bool:
        """Whether the file has date-times rather than hours."""
        return bool(self.header & {"admission_time", "time"})

    def read(self) -> pl.DataFrame:
        """The whole table."""
        return pl.concat([chunk.frame for chunk in self.chunks()])

    def chunks(self, start: int = 0) -> Iterator[Chunk]:
        """See `Table`."""
        is_csv = isinstance(self._table, CsvTable)
        for chunk in self._table.lines(start) if is_csv else self._table.chunks(start):
            line = chunk.first_line + pl.int_range(pl.len(), dtype=pl.Int64)
            if is_csv:  # a field in quotes may go over several lines
                breaks = pl.sum_horizontal(pl.col(pl.String).str.count_matches("\n").fill_null(0))
                line += breaks.cum_sum().shift(1, fill_value=0)
            yield Chunk(
                trimmed(chunk.frame.with_columns(line=line)), chunk.first_line, chunk.bytes_read
            )


def open_table(source: Path, name: str, layout: Layout) -> Lines | None:
    """The table of that name; None if it is absent and need not be there."""
    columns = dict.fromkeys(layout.columns, pl.String)
    absent_ok = [c for c in layout.columns if c not in layout.required]
    table: CsvTable | ParquetTable | None = CsvTable.find(
        source, name, columns, absent_ok=absent_ok
    )
    parquet = [p for p in sorted(source.iterdir()) if p.name.lower() == f"{name}.parquet"]
    if table is not None and parquet:
        raise SourceError(f"{source}: holds both {table.path.name} and {parquet[0].name}")
    if parquet:
        table = ParquetTable(parquet, columns, absent_ok=absent_ok)
    if table is None:
        if layout.needed:
            raise SourceError(f"{source}: there is no {name}.csv, {name}.csv.gz or {name}.parquet")
        return None
    header = _header(table.path)
    for column in header:
        if column not in layout.columns:
            raise SourceError(
                f"{table.path}: line 1: column {column!r} is not one of {', '.join(layout.columns)}"
            )
    kinds = [clock for clock in layout.clocks if set(clock) & set(header)]
    if layout.clocks and len(kinds) != 1:
        firsts = " or ".join(clock[0] for clock in layout.clocks)
        what = "both hours and date-times" if kinds else "no times"
        raise SourceError(f"{table.path}: line 1: there are {what}; give {firsts}")
    if kinds:
        needed = kinds[0][: 2 if kinds[0][0] == "admission_time" else 1]
        for column in needed:
            if column not in header:
                raise SourceError(f"{table.path}: line 1: there is no column {column!r}")
    return Lines(table, header)


def _header(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(pq.read_schema(path).names)
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        text = stream.readline().decode("utf-8-sig")
    return [name.strip().lower() for name in next(csv.reader([text]))]
