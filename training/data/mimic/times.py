"""Times of MIMIC: how they are read, and small tables with theirs."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from training.data.csv_table import CsvTable
from training.data.sources import SourceError, Tally

_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_DATE_FORMAT = "%Y-%m-%d"


def read_time(column: str) -> pl.Expr:
    """A time of the source; null where it cannot be read."""
    return pl.col(column).str.to_datetime(_TIME_FORMAT, strict=False)


def read_date(column: str) -> pl.Expr:
    """A time of which the day alone counts, with or without a time of day; null: not readable.

    Spreadsheets and databases cut "2094-03-05 00:00:00" to "2094-03-05".
    """
    day = pl.col(column).str.to_date(_DATE_FORMAT, strict=False)
    return pl.coalesce(read_time(column), day.cast(pl.Datetime("us")))


def hours_after(column: str, start: str) -> pl.Expr:
    """Hours from one time column to another."""
    return (pl.col(column) - pl.col(start)).dt.total_seconds() / 3600


def count_unreadable(
    text: pl.DataFrame, read: pl.DataFrame, columns: Sequence[str], table: str, tally: Tally
) -> None:
    """Count the times of `columns` that are there as text but could not be read."""
    if unreadable := sum(read[c].null_count() - text[c].null_count() for c in columns):
        tally.refused[f"unreadable-time:{table}"] += unreadable


def timed_table(
    table: CsvTable,
    name: str,
    tally: Tally,
    *,
    times: Sequence[str] = (),
    dates: Sequence[str] = (),
) -> pl.DataFrame:
    """A whole table with its times and dates read; those that cannot be read are null and counted.

    Raises SourceError if most of a column cannot be read: the stays would be lost for a reason that
    no rule of the cohort tells.
    """
    text = table.read()
    read = text.with_columns(*(read_time(c) for c in times), *(read_date(c) for c in dates))
    for column in (*times, *dates):
        there = text[column].count()
        if (unreadable := there - read[column].count()) > there / 2:
            form = "YYYY-MM-DD" if column in dates else "YYYY-MM-DD hh:mm:ss"
            raise SourceError(
                f"{table.path}: column {column!r}: {unreadable:,} of {there:,} are not of the form "
                f"{form}"
            )
    count_unreadable(text, read, (*times, *dates), name, tally)
    return read
