"""MEDS 0.4 data sets (Medical Event Data Standard): one long table of coded events of each subject.

A source is an official folder (`data/**/*.parquet`, `metadata/`) or a folder with nothing but the
event files. What the codes mean is told by a code map (`meds_code_map`). MEDS knows subjects, not
stays: a stay is an ICU admission with the discharge that follows it, called `SUBJECT-K` where K
counts the admissions of the subject.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from llm4ehr.store import StoreInfo
from llm4ehr.variables import VARIABLE_INDEX
from training.data import gcs
from training.data.cleaning import EVENT_COLUMNS, OBSERVATION_COLUMNS
from training.data.csv_table import DType
from training.data.extraction import Cohort, Expected, Items, Scan
from training.data.meds.code_map import fits, load_code_map, shipped_code_map
from training.data.meds.stays import find_stays, hours_since_admission, labelled_tasks
from training.data.parquet_table import ParquetTable
from training.data.sources import SourceError, Tally
from training.data.unit_conversion import with_canonical

_INFO = StoreInfo(
    source="meds",
    licence="not stated",
    citation="",
    created_by="training.data.meds.reader",
    label_notes={
        "mortality": (
            "The hospital discharge that ends the stay says so, or the death is not after it; null "
            "without a hospital discharge, unless the death is not after ICU discharge."
        ),
        "length_of_stay": "From ICU admission to ICU discharge.",
        "decompensation": (
            "Time of the death code. Where that is midnight only the day is known, and the death "
            "lies in its 24 hours."
        ),
        "phenotyping": "ICD codes between hospital admission and discharge; null without any.",
    },
)
_COLUMNS: Mapping[str, DType] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "text_value": pl.String,
    "effective_time": pl.Datetime("us"),
    "priority": pl.Int8,
}
_NUMBERS = ("numeric_value", "value")  # "value": as data sets of MEDS 0.1 call it
_ROLE = {
    "code": pl.String,
    "kind": pl.String,
    "name": pl.String,
    "unit": pl.String,
    "_priority_of_code": pl.Int8,
    "_delay": pl.Float64,
}


class Meds:
    """The data set in the folder `source`. Raises SourceError if there is none.

    `code_map`: a YAML file. Without it, data sets that `dataset` wrote are read as such,
    and all others as the public ETL of MIMIC-IV writes them.
    """

    limits = True

    def __init__(self, source: Path, *, code_map: Path | None = None) -> None:
        self._source = source
        paths = _event_files(source)
        names = set(pq.read_schema(paths[0]).names)
        number = next((n for n in _NUMBERS if n in names), _NUMBERS[0])
        self._number = number
        absent_ok = (number, "text_value", "effective_time", "priority")
        columns = {**_COLUMNS, number: pl.Float32}
        self._table = ParquetTable(paths, columns, absent_ok=absent_ok)
        about = _json(source / "metadata" / "dataset.json")
        name = " ".join(str(about[k]) for k in ("dataset_name", "dataset_version") if about.get(k))
        if code_map is not None:
            self._map = load_code_map(code_map)
        else:
            own = about.get("etl_name") == "llm4ehr"
            self._map = shipped_code_map("llm4ehr" if own else "mimic")
        self._descriptions = _descriptions(source / "metadata" / "codes.parquet")
        self.info = replace(
            _INFO,
            licence=about.get("license") or _INFO.licence,
            citation=name,
            options={"code_map": self._map.name},
        )
        self.expected = Expected(absent_variables=self._absent_variables())

    def cohort(self, tally: Tally) -> Cohort:
        """Every ICU stay with an end."""
        patterns = [p for of in self._map.stays.patterns().values() for p in of]
        rows = pl.concat(_of_codes(chunk.frame, patterns) for chunk in self._table.chunks())
        rows = rows.select("subject_id", "time", "code", value=_decimal(self._number))
        splits = _splits(self._source / "metadata" / "subject_splits.parquet")
        cohort = find_stays(rows, self._map.stays, splits, tally)
        self.expected = replace(self.expected, tasks=labelled_tasks(cohort.stays))
        return cohort

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """One pass over the events."""
        windows = cohort.stays.select(
            pl.col("subject_id").cast(pl.Int64),
            "_admission",
            "end_hours",
            stay=pl.int_range(pl.len(), dtype=pl.Int32),
        )

        def select(frame: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            return self._select(frame, windows, tally)

        return [Scan("data", self._table, select)]

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """Totals of the coma score, and what the codes mean."""
        rows = items["data"]
        observed = rows.filter(kind="observation").rename({"name": "variable"})
        components = rows.filter(kind="gcs").rename({"name": "component"})
        totals = gcs.totals(
            components.select("stay", "hours", "available_hours", "component", "value")
        ).with_columns(variable=pl.lit("gcs_total"), priority=pl.lit(0, pl.Int8))
        # A total that was charted counts for more than one that is summed up.
        totals = totals.join(
            observed.filter(variable="gcs_total"), on=["stay", "hours"], how="anti"
        )
        events = rows.filter(kind="event").rename({"name": "code"})
        return Items(
            pl.concat([f.select(*OBSERVATION_COLUMNS) for f in (observed, totals)]),
            events.select(*EVENT_COLUMNS),
            self._codes(events.select("code", "meds_code").unique()),
        )

    def _select(self, frame: pl.DataFrame, windows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
        roles = [(code, *self._map.roles[code][:5]) for code in frame["code"].unique()]
        of_code = pl.DataFrame(roles, schema=_ROLE, orient="row").filter(
            pl.col("kind") != "ignored"
        )
        mapped = frame.join(of_code, on="code").with_row_index("_source_row")
        untimed = pl.col("time").is_null()
        if n := mapped.select(untimed.sum()).item():
            tally.refused["untimed:data"] += n
        hours = hours_since_admission(pl.coalesce("effective_time", "time"))
        known = hours_since_admission(pl.col("time")) + pl.col("_delay")
        rows = (
            mapped.filter(~untimed)
            .join(windows, on="subject_id")
            .with_columns(hours=hours, known=known)
            .filter(pl.col("hours").is_between(0, "end_hours"))
        )
        if outside := len(mapped.filter(~untimed)) - rows["_source_row"].n_unique():
            tally.refused["outside-stay:data"] += outside
        score = pl.when(kind="gcs").then(gcs.score_of(pl.col("text_value")))
        rows = rows.with_columns(
            value=pl.coalesce(_decimal(self._number), score),
            available_hours=pl.when(pl.col("known") > pl.col("hours")).then("known"),
            priority=pl.coalesce("priority", "_priority_of_code"),
        )
        wanted = ["stay", "kind", "name", "hours", "available_hours", "value", "priority"]
        wanted.append("meds_code")
        rows = rows.with_columns(meds_code=pl.when(kind="event").then("code"))
        others = rows.filter(pl.col("kind") != "observation").select(wanted)
        return pl.concat(
            [others, _converted(rows.filter(kind="observation"), tally).select(wanted)]
        )

    def _codes(self, used: pl.DataFrame) -> pl.DataFrame:
        """What events mean. Several codes of the source may be one event."""
        meaning: dict[str, tuple[str, str | None]] = {}
        for event, code in used.sort("code", "meds_code").iter_rows():
            role = self._map.roles[code]
            description, unit = self._descriptions.get(code, (None, None))
            words = role.descriptor or description or " ".join(code.replace("_", " ").split("//"))
            meaning.setdefault(event, (words.lower(), role.unit or unit))
        return pl.DataFrame(
            [(event, *m) for event, m in meaning.items()],
            schema=dict.fromkeys(("code", "descriptor", "unit"), pl.String),
            orient="row",
        )

    def _absent_variables(self) -> frozenset[str]:
        """Variables that no code of the data set stands for, as far as its list of codes tells."""
        present = self._map.roles.variables
        if self._descriptions:
            roles = [self._map.roles[code] for code in self._descriptions]
            present = frozenset(
                "gcs_total" if r.kind == "gcs" else r.name
                for r in roles
                if r.kind in ("observation", "gcs")
            )
        return frozenset(VARIABLE_INDEX) - present


def _of_codes(frame: pl.DataFrame, patterns: Sequence[str]) -> pl.DataFrame:
    """The rows whose code fits a pattern, which is looked up once for each code."""
    codes = frame.select(pl.col("code").unique()).filter(fits(pl.col("code"), patterns))
    return frame.join(codes, on="code", how="semi")


def _converted(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Rows of variables with values in canonical units; what cannot be converted is counted."""
    finite = pl.when(pl.col("value").is_finite()).then("value")
    rows = with_canonical(rows.with_columns(variable="name", _value=finite))
    rows = rows.with_columns(value="_canonical")
    for reason, bad in (
        ("no-value", pl.col("_value").is_null()),
        ("unit-missing", pl.col("_value").is_not_null() & pl.col("value").is_null()),
    ):
        for name, n in rows.filter(bad).group_by("variable").len().iter_rows():
            tally.refused[f"{reason}:{name}"] += n
    return rows.filter(pl.col("value").is_not_null())


def _decimal(column: str) -> pl.Expr:
    """Numbers as they were written: 7.4 is stored in single precision as 7.400000095."""
    return pl.col(column).cast(pl.String).cast(pl.Float64)


def _event_files(source: Path) -> list[Path]:
    folder = source / "data" if (source / "data").is_dir() else source
    paths = sorted(
        path
        for path in folder.rglob("*.parquet")
        if path.is_file() and path.relative_to(source).parts[0] != "metadata"
    )
    if not paths:
        raise SourceError(f"{source}: there is no data/**/*.parquet")
    return paths


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise SourceError(f"{path}: not a JSON object")
    return body


def _descriptions(path: Path) -> dict[str, tuple[str | None, str | None]]:
    """Description and unit of each code; empty without that file."""
    if not path.exists():
        return {}
    columns = dict.fromkeys(("code", "description", "unit"), pl.String)
    rows = ParquetTable([path], columns, absent_ok=("description", "unit")).read()
    return {code: (description, unit) for code, description, unit in rows.iter_rows()}


def _splits(path: Path) -> pl.DataFrame | None:
    """`subject_id` and `split` of every subject; None without that file."""
    if not path.exists():
        return None
    splits = ParquetTable([path], {"subject_id": pl.Int64, "split": pl.String}).read()
    if splits["subject_id"].is_duplicated().any():
        raise SourceError(f"{path}: a subject is listed twice")
    return splits
