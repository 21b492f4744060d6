"""A tiny source in the layout of MIMIC-IV, and its extraction."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from training.data.build import build_store
from training.data.mimic.mimic4 import Mimic4

UNITS = "Medical Intensive Care Unit (MICU)"


TABLES = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,"
    "hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/d_labitems": "itemid,label,fluid,category",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,"
    "charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,"
    "comments",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,"
    "highnormalvalue",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,"
    "valuenum,valueuom,warning",
    "icu/inputevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,itemid,"
    "amount,amountuom,rate,rateuom,orderid,linkorderid,statusdescription",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,"
    "itemid,value,valueuom,orderid,linkorderid,statusdescription",
}


Rows = Mapping[str, list[dict[str, object]]]


def a_patient(n: int, **changes: object) -> dict[str, list[dict[str, object]]]:
    """Patient `n` with one admission and one ICU stay from 2180-05-01 10:00 on, for two days."""
    ids = {"subject_id": n, "hadm_id": 100 + n}
    facts: dict[str, object] = {
        "gender": "F", "anchor_age": 60, "anchor_year": 2178, "deathtime": "", "dod": "",
        "hospital_expire_flag": 0, "first_careunit": UNITS, "last_careunit": UNITS,
        "intime": "2180-05-01 10:00:00", "outtime": "2180-05-03 10:00:00", "stay_id": 1000 + n,
    } | ids | changes  # fmt: skip
    return {name: [facts] for name in ("hosp/patients", "hosp/admissions", "icu/icustays")} | {
        "icu/chartevents": [
            facts | {"charttime": "2180-05-01 11:00:00", "itemid": 220045, "value": 80}
        ]
    }


def write(folder: Path, *parts: Rows, without: tuple[str, ...] = ()) -> Path:
    """The tables of `parts` in the published layout."""
    for name, header in TABLES.items():
        if name in without:
            continue
        lines = [header]
        for part in parts:
            for row in part.get(name, []):
                lines.append(",".join(str(row.get(column, "")) for column in header.split(",")))
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
    return folder


class Extraction:
    """What `prepare` would write, as frames."""

    def __init__(self, source: Path, work: Path, **options: float) -> None:
        self.waterfall = build_store(
            Mimic4(source, **options), work / "store", work / "work", progress=False
        )
        read = {
            name: pl.read_parquet(work / "store" / f"{name}.parquet").with_columns(
                pl.col(pl.Categorical, pl.Enum).cast(pl.String)
            )
            for name in ("episodes", "observations", "events", "codes")
        }
        self.episodes, self.observations = read["episodes"], read["observations"]
        self.events, self.codes = read["events"], read["codes"]

    def episode(self, stay: int) -> dict[str, object]:
        return self.episodes.row(by_predicate=pl.col("episode_id") == str(stay), named=True)

    def observed(self, stay: int, variable: str) -> list[tuple[float, ...]]:
        """(hours, available hours, value, priority), rounded."""
        return _rows(
            self.observations.filter(episode_id=str(stay), variable=variable),
            ["hours", "available_hours", "value", "priority"],
        )

    def happened(self, stay: int, code: str) -> list[tuple[float, ...]]:
        """(hours, available hours, value), rounded."""
        return _rows(
            self.events.filter(episode_id=str(stay), code=code),
            ["hours", "available_hours", "value"],
        )


def _rows(frame: pl.DataFrame, columns: list[str]) -> list[tuple[float, ...]]:
    return frame.select(pl.col(columns).cast(pl.Float64).round(4)).rows()


Extract = Callable[..., Extraction]


# The made-up set: what is measured and done.


def charted(hour: str, itemid: int, value: object, **changes: object) -> Rows:
    row = {"stay_id": 1001, "charttime": f"2180-05-01 {hour}:00", "itemid": itemid, "value": value}
    return {"icu/chartevents": [row | changes]}


def drawn(hour: str, itemid: int, value: object, **changes: object) -> Rows:
    row = {"subject_id": 1, "charttime": f"2180-05-01 {hour}:00", "itemid": itemid, "value": value}
    return {"hosp/labevents": [row | changes]}


def order(table: str, start: str, end: str, itemid: int, **changes: object) -> Rows:
    row = {
        "stay_id": 1001,
        "starttime": f"2180-05-01 {start}:00",
        "endtime": f"2180-05-01 {end}:00",
        "itemid": itemid,
        "statusdescription": "FinishedRunning",
        "linkorderid": 1,
    }
    return {f"icu/{table}": [row | changes]}
