"""A unit's own data as CSV or Parquet tables; the layout stands in docs/datasets/table.md.

The tables are read twice: once to check every row, so that a file which is wrong is known before
anything is built and the report of a run that was stopped and goes on is whole, and once to extract
them. Both readings apply the same rules (`check`, `items`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl

from llm4ehr.store import StoreInfo
from llm4ehr.variables import VARIABLE_INDEX
from training.data.extraction import (
    Cohort,
    Expected,
    Items,
    Scan,
    Step,
    exact_death,
    split_by_subject,
)
from training.data.meds.stays import labelled_tasks
from training.data.phenotypes import phenotypes
from training.data.sources import SourceError, Tally
from training.data.unit_conversion import variables_named
from training.data.user_table.check import (
    FileReport,
    Report,
    check_diagnoses,
    check_stays,
    with_moments,
)
from training.data.user_table.files import LAYOUTS, open_table
from training.data.user_table.items import (
    CODE_COLUMNS,
    Clock,
    check_codes,
    check_events,
    check_observations,
    describe,
    known_codes,
)

_INFO = StoreInfo(
    source="table",
    licence="not stated: a unit's own data",
    citation="",
    created_by="training.data.user_table.reader",
    label_notes={
        "mortality": "The column mortality of stays: death in hospital.",
        "length_of_stay": "los_hours of stays; with date-times, from admission to discharge.",
        "decompensation": "death_time or death_hours of stays where mortality is true.",
        "phenotyping": "From the table of diagnoses; null for a stay without a row there.",
    },
)


class UserTables:
    """The tables in the folder `source`. Raises SourceError if they do not have the layout.

    Refused rows are written to the CSV file `rejected`, if it is given.
    """

    info = _INFO
    limits = True
    expected = Expected()

    def __init__(self, source: Path, *, rejected: Path | None = None) -> None:
        self._files = {name: open_table(source, name, layout) for name, layout in LAYOUTS.items()}
        stays = self._files["stays"]
        for file in self._files.values():
            if file is not None and stays is not None and file.moments and not stays.moments:
                raise SourceError(f"{file.path}: date-times need admission_time in stays")
        self._rejected = rejected
        self._lookup = pl.DataFrame()
        self._codes = pl.DataFrame(schema=CODE_COLUMNS)
        self._known_codes = known_codes(pl.DataFrame(schema=CODE_COLUMNS))
        self._zoned = False

    def check(self) -> Report:
        """Check every row of every file. Raises SourceError only for a file that is no table."""
        report, *_ = self._check(Tally())
        return report

    def cohort(self, tally: Tally) -> Cohort:
        """Every sound row of `stays`. Raises SourceError if a file has too many refused rows."""
        report, stays, rows = self._check(tally)
        if not report.passed:
            failed = "; ".join(str(file) for file in report.files if not file.passed)
            listed = f". All refused rows: {self._rejected}" if self._rejected else ""
            raise SourceError(f"more than 1 % of the rows are refused. {failed}{listed}")
        return Cohort(
            stays,
            (
                Step("rows of the table of stays", len(rows), rows["subject_id"].n_unique()),
                Step("whose row is sound", len(stays), stays["subject_id"].n_unique()),
            ),
        )

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """Observations and, where there are any, events."""
        return [
            Scan(name, table, self._select(name))
            for name in ("observations", "events")
            if (table := self._files[name]) is not None
        ]

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """The scans have it all; what is left is what the codes mean."""
        observations = items["observations"]
        if "events" in items:
            events = items["events"]
        else:
            events = observations.clear().rename({"variable": "code"}).drop("priority")
        used = self._codes.join(events.select("code").unique(), on="code", how="semi")
        return Items(observations, events, used)

    def _select(self, name: str) -> Callable[[pl.DataFrame, Tally], pl.DataFrame]:
        def select(frame: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            good, refused, n_of_refused_stays = self._sift(name, frame)
            _count(name, refused, tally)
            if n_of_refused_stays:
                tally.refused[f"refused-episode:{name}"] += n_of_refused_stays
            early = pl.col("available_hours") < pl.col("hours")
            if n := good.select(early.sum()).item():
                tally.repaired[f"available-before-true:{name}"] += n
            columns = ["stay", "variable" if name == "observations" else "code"]
            columns += ["hours", "available_hours", "value"]
            columns += ["priority"] if name == "observations" else []
            return good.select(columns).with_columns(
                available_hours=pl.when(~early).then("available_hours")
            )

        return select

    def _sift(self, name: str, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, int]:
        """Sound and refused rows of a chunk, and the number of rows of stays that were refused."""
        frame = frame.join(self._lookup, on="episode_id", how="left", maintain_order="left")
        of_refused = pl.col("_refused").fill_null(value=False)
        n = frame.select(of_refused.sum()).item()
        frame = frame.filter(~of_refused)
        table = self._files[name]
        clock = Clock(moments=table is not None and table.moments, zoned=self._zoned)
        if name == "observations":
            good, refused = check_observations(frame, clock)
        elif name == "events":
            good, refused = check_events(frame, clock, self._known_codes)
        else:
            good, refused = check_diagnoses(frame)
        return good, refused, n

    def _check(self, tally: Tally) -> tuple[Report, pl.DataFrame, pl.DataFrame]:
        """Report, sound stays as a cohort has them, and all rows of stays."""
        report = Report()
        with _file_of_refused(self._rejected) as out:

            def note(name: str, n_rows: int, refused: pl.DataFrame) -> None:
                table = self._files[name]
                assert table is not None
                if not report.files or report.files[-1].file != table.path.name:
                    report.files.append(FileReport(table.path.name))
                report.files[-1].add(n_rows, refused)
                if out is not None:
                    file = pl.lit(table.path.name).alias("file")
                    refused.select(file, pl.all()).write_csv(out, include_header=False)

            stays, rows = self._check_stays(note, tally)
            self._check_codes(note, tally)
            described: list[pl.DataFrame] = []
            named: set[str] = set()
            for chunk in self._chunks("observations"):
                good, refused, _ = self._sift("observations", chunk)
                note("observations", len(chunk), refused)
                named |= variables_named(chunk["variable"].unique())
            for chunk in self._chunks("events"):
                good, refused, _ = self._sift("events", chunk)
                note("events", len(chunk), refused)
                described = [describe(pl.concat([*described, describe(good)]))]
            coded = []
            for chunk in self._chunks("diagnoses"):
                good, refused, _ = self._sift("diagnoses", chunk)
                note("diagnoses", len(chunk), refused)
                _count("diagnoses", refused, tally)
                coded.append(good)
        for codes in described:
            self._codes = codes.select(
                "code", "unit", descriptor=pl.coalesce("descriptor", "plain")
            )
        stays = _with_phenotypes(stays, coded)
        # A variable that the file names but that no row can be used of is not absent but lost.
        self.expected = Expected(
            absent_variables=frozenset(VARIABLE_INDEX) - named, tasks=labelled_tasks(stays)
        )
        return report, stays, rows

    def _chunks(self, name: str) -> Iterator[pl.DataFrame]:
        table = self._files[name]
        return iter(()) if table is None else (chunk.frame for chunk in table.chunks())

    def _check_stays(self, note: Any, tally: Tally) -> tuple[pl.DataFrame, pl.DataFrame]:
        table = self._files["stays"]
        assert table is not None
        rows = table.read()
        if table.moments:
            times = with_moments(rows.select("admission_time"), ["admission_time"])
            readable = times.filter(pl.col("_admission_time_at").is_not_null())
            self._zoned = bool(readable["_admission_time_zone"].head(1).any())
        stays, refused = check_stays(rows, moments=table.moments, zoned=self._zoned)
        note("stays", len(rows), refused)
        _count("stays", refused, tally)
        stays = _as_cohort(stays, tally)
        numbered = stays.select(
            "episode_id",
            "_admission",
            stay=pl.int_range(pl.len(), dtype=pl.Int32),
            _refused=pl.lit(value=False),
        )
        bad = rows.select("episode_id").drop_nulls().unique()
        bad = bad.join(numbered, on="episode_id", how="anti").with_columns(
            _refused=pl.lit(value=True)
        )
        self._lookup = pl.concat([numbered, bad], how="diagonal")
        return stays, rows

    def _check_codes(self, note: Any, tally: Tally) -> None:
        table = self._files["codes"]
        if table is None:
            return
        rows = table.read()
        own, refused = check_codes(rows)
        note("codes", len(rows), refused)
        _count("codes", refused, tally)
        self._known_codes = known_codes(own)


def check(source: Path, rejected: Path | None = None) -> Report:
    """Check the tables in the folder `source` without building anything.

    Refused rows are written to the CSV file `rejected`, if it is given. Raises SourceError for a
    file that cannot be read as a table of its layout at all.
    """
    return UserTables(source, rejected=rejected).check()


@contextmanager
def _file_of_refused(path: Path | None) -> Iterator[IO[bytes] | None]:
    """The file `path` with its header, None without one. It is removed if no row gets there."""
    if path is None:
        yield None
        return
    header = b"file,line,column,reason,message\n"
    try:
        with path.open("wb") as out:
            out.write(header)
            yield out
    finally:
        if path.exists() and path.stat().st_size == len(header):
            path.unlink()


def _as_cohort(stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Sound stays with all columns of a cohort but the phenotypes, sorted by id."""
    died = pl.col("mortality").fill_null(value=False)
    elsewhere = pl.col("death_hours").is_not_null() & ~died
    if n := stays.select(elsewhere.sum()).item():
        tally.refused["death-not-in-hospital:stays"] += n
    stays = stays.sort("episode_id").with_columns(
        pl.when(died).then("death_hours").alias("death_hours"),
        n_hours=pl.col("end_hours").ceil().clip(lower_bound=1).cast(pl.Int16),
        benchmark_split=pl.lit(None, pl.String),
    )
    if stays["split"].null_count() == len(stays):
        stays = stays.with_columns(split_by_subject("table", stays["subject_id"]))
    return stays.with_columns(*exact_death(pl.col("death_hours"))).drop("death_hours")


def _with_phenotypes(stays: pl.DataFrame, coded: Sequence[pl.DataFrame]) -> pl.DataFrame:
    if not coded:
        return stays.with_columns(phenotypes=pl.lit(None, pl.List(pl.String)))
    of = phenotypes(pl.concat(coded))
    numbered = stays.with_columns(stay=pl.int_range(pl.len(), dtype=pl.Int32))
    return numbered.join(of, on="stay", how="left", maintain_order="left").drop("stay")


def _count(name: str, refused: pl.DataFrame, tally: Tally) -> None:
    for reason, n in refused.group_by("reason").len().iter_rows():
        tally.refused[f"{reason}:{name}"] += n
