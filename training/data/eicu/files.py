"""Columns that are read of each table of eICU, and how its text and its minutes are understood."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from training.data.csv_table import CsvTable
from training.data.sources import Tally
from training.progress import progress_bar

KEY = "patientunitstayid"

COLUMNS: Mapping[str, Mapping[str, type[pl.DataType]]] = {
    "patient": {
        KEY: pl.Int32,
        "patienthealthsystemstayid": pl.Int32,
        "uniquepid": pl.String,
        "gender": pl.String,
        "age": pl.String,
        "unittype": pl.String,
        "admissionheight": pl.Float64,
        "admissionweight": pl.Float64,
        "hospitaldischargeoffset": pl.Int32,
        "hospitaldischargestatus": pl.String,
        "unitdischargeoffset": pl.Int32,
        "unitdischargestatus": pl.String,
    },
    "diagnosis": {KEY: pl.Int32, "diagnosisoffset": pl.Int32, "icd9code": pl.String},
    "nurseCharting": {
        KEY: pl.Int32,
        "nursingchartoffset": pl.Int32,
        "nursingchartentryoffset": pl.Int32,
        "nursingchartcelltypevallabel": pl.String,
        "nursingchartcelltypevalname": pl.String,
        "nursingchartvalue": pl.String,
    },
    "vitalPeriodic": {
        KEY: pl.Int32,
        "observationoffset": pl.Int32,
        "heartrate": pl.Float64,
        "respiration": pl.Float64,
        "sao2": pl.Float64,
        "temperature": pl.Float64,
        "systemicsystolic": pl.Float64,
        "systemicdiastolic": pl.Float64,
        "systemicmean": pl.Float64,
    },
    "vitalAperiodic": {
        KEY: pl.Int32,
        "observationoffset": pl.Int32,
        "noninvasivesystolic": pl.Float64,
        "noninvasivediastolic": pl.Float64,
        "noninvasivemean": pl.Float64,
    },
    "lab": {
        KEY: pl.Int32,
        "labresultoffset": pl.Int32,
        "labresultrevisedoffset": pl.Int32,
        "labname": pl.String,
        "labresult": pl.Float64,
        "labresulttext": pl.String,
        "labmeasurenamesystem": pl.String,
        "labmeasurenameinterface": pl.String,
    },
    "respiratoryCharting": {
        KEY: pl.Int32,
        "respchartoffset": pl.Int32,
        "respchartentryoffset": pl.Int32,
        "respchartvaluelabel": pl.String,
        "respchartvalue": pl.String,
    },
    "physicalExam": {
        KEY: pl.Int32,
        "physicalexamoffset": pl.Int32,
        "physicalexampath": pl.String,
        "physicalexamvalue": pl.String,
    },
    "medication": {
        KEY: pl.Int32,
        "drugorderoffset": pl.Int32,
        "drugstartoffset": pl.Int32,
        "drugstopoffset": pl.Int32,
        "drugname": pl.String,
        "drughiclseqno": pl.Int32,
        "drugordercancelled": pl.String,
    },
    "infusionDrug": {
        KEY: pl.Int32,
        "infusionoffset": pl.Int32,
        "drugname": pl.String,
        "drugrate": pl.String,
    },
    # Whether a treatment is active upon discharge is known at discharge only: never read.
    "treatment": {KEY: pl.Int32, "treatmentoffset": pl.Int32, "treatmentstring": pl.String},
}
# Never empty in the official files, so that an empty one is a damaged row.
_REQUIRED: Mapping[str, Sequence[str]] = {
    "patient": ("patienthealthsystemstayid", "uniquepid"),
    "diagnosis": ("diagnosisoffset",),
    "nurseCharting": ("nursingchartoffset", "nursingchartentryoffset"),
    "vitalPeriodic": ("observationoffset",),
    "vitalAperiodic": ("observationoffset",),
    "lab": ("labresultoffset", "labname"),
    "respiratoryCharting": ("respchartoffset", "respchartentryoffset", "respchartvaluelabel"),
    "physicalExam": ("physicalexamoffset", "physicalexampath"),
    "medication": ("drugorderoffset", "drugstartoffset", "drugordercancelled"),
    "infusionDrug": ("infusionoffset",),
    "treatment": ("treatmentoffset", "treatmentstring"),
}
OPTIONAL: Sequence[str] = tuple(name for name in COLUMNS if name != "patient")
BEDSIDE: Sequence[str] = ("nurseCharting", "vitalPeriodic", "vitalAperiodic")
"""The tables with vital signs: an extraction needs one of them."""

VARIABLE_TABLES: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("hr", "rr", "spo2", "temp"), ("nurseCharting", "vitalPeriodic")),
    **dict.fromkeys(("sbp", "dbp", "mbp"), BEDSIDE),
    **dict.fromkeys(("glucose", "ph"), ("lab",)),
    "fio2": ("respiratoryCharting", "lab"),
    "gcs_total": ("nurseCharting", "physicalExam"),
}
"""The tables that a variable may come from."""


def find(folder: Path, name: str) -> CsvTable | None:
    """The table of that name in the folder; None if there is none. Raises SourceError."""
    return CsvTable.find(folder, name, COLUMNS[name], required=(KEY, *_REQUIRED[name]))


def whole(table: CsvTable, purpose: str) -> Iterator[pl.DataFrame]:
    """A big table from front to back, for what must be known before it is scanned.

    On a terminal a bar shows how far it is.
    """
    with progress_bar(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(purpose, total=table.size, note="")
        rows = 0
        for chunk in table.chunks():
            yield chunk.frame
            rows += len(chunk.frame)
            bar.update(task, completed=chunk.bytes_read, note=f"{rows:,} rows")
        bar.update(task, completed=table.size)


def of_cohort(rows: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """The rows of the stays in `stays` (KEY, stay Int32), with `stay` in place of the key."""
    return rows.join(stays, on=KEY, how="inner").drop(KEY)


def number(text: pl.Expr) -> pl.Expr:
    """The number that a text is, without "<", ">" or "%" around it; null if it is none."""
    return (
        text.str.strip_chars()
        .str.extract(r"^(?:[<>]=? *)?(-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)) *%?$")
        .cast(pl.Float64)
    )


def count_early(rows: pl.DataFrame, entered: str, minutes: str, table: str, tally: Tally) -> None:
    """Count rows entered before they were true; they are taken as known when they were true."""
    if n := rows.filter(pl.col(entered) < pl.col(minutes)).height:
        tally.repaired[f"entered-before-true:{table}"] += n


def hours(minutes: str) -> pl.Expr:
    """Minutes since unit admission as hours."""
    return pl.col(minutes).cast(pl.Float64) / 60


def known_hours(entered: str, minutes: str) -> pl.Expr:
    """When something was entered, in hours; null where that is not after it was true."""
    return pl.when(pl.col(entered) > pl.col(minutes)).then(hours(entered))
