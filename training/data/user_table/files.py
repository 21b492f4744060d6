"""Files of a unit's own tables: their layout, and their rows as text with line numbers.

Everything is read as text, so that a cell which cannot be read refuses its row and not its file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from training.data.csv_table import CsvTable
from training.data.extraction import Chunk
from training.data.parquet_table import ParquetTable
from training.data.sources import SourceError
from training.data.user_table.check import trimmed


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


_HEADER_BYTES = 2**20


class Lines:
    """A table all of text, trimmed, with the line (or row of a Parquet file) in column `line`."""

    def __init__(
        self,
        table: CsvTable | ParquetTable,
        names: Mapping[str, str],
        *,
        float_ids: Sequence[str] = (),
    ) -> None:
        """`names`: our name of each column of `table`. `float_ids`: ids that are stored as floats,
        as whole numbers are once a cell of their column is empty.
        """
        self._table = table
        self._names = dict(names)
        self._float_ids = list(float_ids)
        self.header = frozenset(names.values())

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
        table = self._table
        is_csv = isinstance(table, CsvTable)
        for chunk in table.lines(start) if isinstance(table, CsvTable) else table.chunks(start):
            frame = chunk.frame.rename(self._names, strict=False)
            frame = frame.with_columns(pl.col(self._float_ids).str.strip_suffix(".0"))
            line = chunk.first_line + pl.int_range(pl.len(), dtype=pl.Int64)
            if is_csv:  # a field in quotes may go over several lines
                breaks = pl.sum_horizontal(pl.col(pl.String).str.count_matches("\n").fill_null(0))
                line += breaks.cum_sum().shift(1, fill_value=0)
            yield Chunk(trimmed(frame.with_columns(line=line)), chunk.first_line, chunk.bytes_read)


def open_table(source: Path, name: str, layout: Layout) -> Lines | None:
    """The table of that name; None if it is absent and need not be there."""
    path = _find(source, name)
    if path is None:
        if layout.needed:
            raise SourceError(f"{source}: there is no {name}.csv, {name}.csv.gz or {name}.parquet")
        return None
    if path.name.lower().endswith(".parquet"):
        return _open_parquet(path, layout)
    header = _csv_header(path)
    where = f"{path}: line 1"
    _check_once(where, header)
    columns = dict.fromkeys(layout.columns, pl.String)
    absent_ok = [c for c in layout.columns if c not in layout.required]
    table = CsvTable(path, columns, absent_ok=absent_ok)
    _check_header(where, header, layout)
    return Lines(table, dict(zip(header, header, strict=True)))


def _open_parquet(path: Path, layout: Layout) -> Lines:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: not readable as Parquet: {error}") from error
    header = [name.strip().lower() for name in schema.names]
    _check_once(str(path), header)
    stored = dict(zip(header, schema.names, strict=True))
    columns = {stored.get(c, c): pl.String for c in layout.columns}
    required = {stored.get(c, c) for c in layout.required}
    table = ParquetTable([path], columns, absent_ok=[c for c in columns if c not in required])
    _check_header(str(path), header, layout)
    float_ids = [
        c
        for c in ("episode_id", "subject_id")
        if c in stored and pa.types.is_floating(schema.field(stored[c]).type)
    ]
    return Lines(table, {theirs: ours for ours, theirs in stored.items()}, float_ids=float_ids)


def _find(source: Path, name: str) -> Path | None:
    """The file of that table, in any case. Raises SourceError if there are several."""
    wanted = {f"{name}{suffix}" for suffix in (".csv", ".csv.gz", ".parquet")}
    try:
        found = sorted(path for path in source.iterdir() if path.name.lower() in wanted)
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror}") from error
    if len(found) > 1:
        raise SourceError(f"{source}: holds both {found[0].name} and {found[1].name}")
    return found[0] if found else None


def _csv_header(path: Path) -> list[str]:
    """Names of the columns, in lower case. Raises SourceError where line 1 is no UTF-8 text."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            line = stream.readline(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error):
        return []  # `CsvTable` says what is wrong with such a file
    where = f"{path}: line 1"
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{where}: the text is UTF-16; save it as UTF-8")
    if b"\0" in line:
        raise SourceError(f"{where}: not UTF-8 text, perhaps UTF-16; save it as UTF-8")
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{where}: not valid UTF-8, perhaps Latin-1; save the text as UTF-8"
        ) from error
    text = text.removesuffix("\n").removesuffix("\r")
    if "\r" in text:
        raise SourceError(f"{where}: lines end in a carriage return alone; end them in a line feed")
    try:
        return [name.strip().lower() for name in next(csv.reader([text]))]
    except csv.Error as error:
        raise SourceError(f"{where}: malformed header") from error


def _check_once(where: str, header: Sequence[str]) -> None:
    """Raise SourceError if a column is there twice."""
    for i, column in enumerate(header):
        if column in header[:i]:
            raise SourceError(f"{where}: column {_called(i, column)} is there twice")


def _check_header(where: str, header: Sequence[str], layout: Layout) -> None:
    """Raise SourceError for a column that is not of the layout, or for times that are not."""
    for i, column in enumerate(header):
        if column not in layout.columns:
            listed = ", ".join(layout.columns)
            raise SourceError(f"{where}: column {_called(i, column)} is not one of {listed}")
    kinds = [clock for clock in layout.clocks if set(clock) & set(header)]
    if layout.clocks and len(kinds) != 1:
        firsts = " or ".join(clock[0] for clock in layout.clocks)
        what = "both hours and date-times" if kinds else "no times"
        raise SourceError(f"{where}: there are {what}; give {firsts}")
    if kinds:
        needed = kinds[0][: 2 if kinds[0][0] == "admission_time" else 1]
        for column in needed:
            if column not in header:
                raise SourceError(f"{where}: there is no column {column!r}")


def _called(i: int, column: str) -> str:
    """A column for messages: by its place where it may be no name but data of a patient."""
    return repr(column) if re.fullmatch("[a-z0-9_]+", column) else f"number {i + 1}"
