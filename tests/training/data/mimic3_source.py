"""A tiny MIMIC-III in the official format, and what a reader makes of a source."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from training.data.cleaning import finish
from training.data.extraction import Cohort, Items
from training.data.mimic.mimic3 import Mimic3
from training.data.sources import Tally

# Headers of the official files, which are in upper case (those of the demo in lower case).
HEADERS = {
    "ICUSTAYS": "ROW_ID,SUBJECT_ID,HADM_ID,ICUSTAY_ID,DBSOURCE,FIRST_CAREUNIT,LAST_CAREUNIT,"
    "FIRST_WARDID,LAST_WARDID,INTIME,OUTTIME,LOS",
    "ADMISSIONS": "ROW_ID,SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,ADMISSION_TYPE,"
    "HOSPITAL_EXPIRE_FLAG",
    "PATIENTS": "ROW_ID,SUBJECT_ID,GENDER,DOB,DOD,DOD_HOSP,DOD_SSN,EXPIRE_FLAG",
    "DIAGNOSES_ICD": "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE",
    "D_ICD_DIAGNOSES": "ROW_ID,ICD9_CODE,SHORT_TITLE,LONG_TITLE",
    "D_ITEMS": "ROW_ID,ITEMID,LABEL,ABBREVIATION,DBSOURCE,LINKSTO,CATEGORY,UNITNAME",
    "D_LABITEMS": "ROW_ID,ITEMID,LABEL,FLUID,CATEGORY,LOINC_CODE",
    "CHARTEVENTS": "ROW_ID,SUBJECT_ID,HADM_ID,ICUSTAY_ID,ITEMID,CHARTTIME,STORETIME,CGID,VALUE,"
    "VALUENUM,VALUEUOM,WARNING,ERROR,RESULTSTATUS,STOPPED",
    "LABEVENTS": "ROW_ID,SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUE,VALUENUM,VALUEUOM,FLAG",
    "INPUTEVENTS_MV": "ROW_ID,SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTTIME,ENDTIME,ITEMID,AMOUNT,"
    "AMOUNTUOM,RATE,RATEUOM,STORETIME,ORDERID,LINKORDERID,CANCELREASON,STATUSDESCRIPTION",
    "PROCEDUREEVENTS_MV": "ROW_ID,SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTTIME,ENDTIME,ITEMID,VALUE,"
    "VALUEUOM,STORETIME,ORDERID,LINKORDERID,CANCELREASON,STATUSDESCRIPTION",
}
STAY = {"subject_id": 1, "hadm_id": 10, "icustay_id": 100}
ADMITTED = {
    "ICUSTAYS": {
        **STAY, "first_careunit": "MICU", "last_careunit": "MICU", "first_wardid": 5,
        "last_wardid": 5, "intime": "2150-01-01 00:00:00", "outtime": "2150-01-03 00:00:00",
        "los": 2.0,
    },
    "ADMISSIONS": {
        "subject_id": 1, "hadm_id": 10, "admittime": "2149-12-31 20:00:00",
        "dischtime": "2150-01-05 12:00:00",
    },
    "PATIENTS": {"subject_id": 1, "gender": "F", "dob": "2090-01-01 00:00:00"},
}  # fmt: skip
LABELS = {
    "D_ITEMS": [
        {"itemid": 221906, "label": "Norepinephrine"},
        {"itemid": 221347, "label": "Amiodarone"},
        {"itemid": 225792, "label": "Invasive Ventilation"},
    ],
    "D_LABITEMS": [
        {"itemid": 50817, "label": "Oxygen Saturation", "fluid": "Blood", "category": "Blood Gas"},
        {"itemid": 50820, "label": "pH", "fluid": "Blood", "category": "Blood Gas"},
        {"itemid": 50821, "label": "pO2", "fluid": "Blood", "category": "Blood Gas"},
        {"itemid": 50912, "label": "Creatinine", "fluid": "Blood", "category": "Chemistry"},
        {"itemid": 50889, "label": "C-Reactive Protein", "fluid": "BLOOD", "category": "CHEMISTRY"},
        {"itemid": 51491, "label": "pH", "fluid": "Urine", "category": "Hematology"},
    ],
}


class Extraction(NamedTuple):
    """What a reader makes of a source, all stays at once."""

    cohort: Cohort
    items: Items
    tally: Tally

    def _row(self, stay: str | int) -> int:
        return self.cohort.stays["episode_id"].to_list().index(str(stay))

    def stay(self, stay: str | int) -> dict[str, Any]:
        return self.cohort.stays.row(self._row(stay), named=True)

    def values(
        self, variable: str, stay: str | int = 100, at: float | None = None
    ) -> list[tuple[float, float | None, float, int]]:
        """(hours, available hours, value, priority), rounded to six digits."""
        found = self.items.observations.filter(stay=self._row(stay), variable=variable)
        if at is not None:
            found = found.filter((pl.col("hours") - at).abs() < 1e-4)
        columns = ("hours", "available_hours", "value", "priority")
        return found.select(pl.col(columns[:3]).round(6), "priority").rows()

    def events(
        self, code: str, stay: str | int = 100
    ) -> list[tuple[float, float | None, float | None]]:
        """(hours, available hours, value), rounded to six digits."""
        found = self.items.events.filter(stay=self._row(stay), code=code)
        return found.select(pl.col("hours", "available_hours", "value").round(6)).rows()


def extract(source: Path, **options: Any) -> Extraction:
    tally = Tally()
    reader = Mimic3(source, **options)
    cohort = reader.cohort(tally)
    kept = {
        scan.name: pl.concat([scan.select(c.frame, tally) for c in scan.table.chunks()])
        for scan in reader.scans(cohort)
    }
    stays = cohort.stays.with_columns(stay=pl.int_range(pl.len(), dtype=pl.Int32))
    made = reader.assemble(stays, kept, tally)
    return Extraction(cohort, finish(made, stays, tally, limits=reader.limits), tally)


def write(folder: Path, **tables: Sequence[Mapping[str, Any]]) -> Path:
    """Write all tables of the official format; one stay without any rows unless told."""
    given = {name: [row] for name, row in ADMITTED.items()} | LABELS | tables
    for name, header in HEADERS.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header.split(","))
            for row in given.get(name, []):
                assert {c.upper() for c in row} <= set(header.split(","))
                writer.writerow([row.get(c.lower(), "") for c in header.split(",")])
    return folder


def chart(itemid: int, value: object, hour: float = 1, **more: Any) -> dict[str, Any]:
    return {**STAY, "itemid": itemid, "charttime": at_hour(hour), "value": value, **more}


def lab(itemid: int, value: object, hour: float = 1, **more: Any) -> dict[str, Any]:
    ids = {"subject_id": 1, "hadm_id": 10}
    return {**ids, "itemid": itemid, "charttime": at_hour(hour), "value": value, **more}


def order(itemid: int, start: float, end: float, **more: Any) -> dict[str, Any]:
    times = {"starttime": at_hour(start), "endtime": at_hour(end)}
    state = {"cancelreason": 0, "statusdescription": "FinishedRunning"}
    return {**STAY, "itemid": itemid, **times, **state, **more}


def at_hour(hour: float) -> str:
    minutes = round(hour * 60)
    day, rest = divmod(minutes, 24 * 60)
    return f"2150-01-{1 + day:02} {rest // 60:02}:{rest % 60:02}:00"


def admission(number: int, **changes: Any) -> dict[str, dict[str, Any]]:
    """Rows of a patient of its own with one stay."""
    ids = {"subject_id": number, "hadm_id": number * 10, "icustay_id": number * 100}
    return {
        table: {
            **row,
            **{c: v for c, v in ids.items() if c in row},
            **{c: v for c, v in changes.items() if c.upper() in HEADERS[table].split(",")},
        }
        for table, row in ADMITTED.items()
    }
