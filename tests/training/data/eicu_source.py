"""A tiny source in the layout of eICU, and its extraction."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from training.data.cleaning import finish
from training.data.eicu.files import COLUMNS
from training.data.eicu.reader import EICU
from training.data.extraction import Cohort, Items
from training.data.sources import Tally

Rows = Sequence[Mapping[str, Any]]


# ------------------------------------------------------------------ a synthetic official-format set


def write(folder: Path, name: str, rows: Rows, *, suffix: str = ".csv") -> None:
    """A table with the columns that are read, and one that is not."""
    header = [*COLUMNS[name], "notread"]
    opened = gzip.open if suffix.endswith(".gz") else open
    with opened(folder / f"{name}{suffix}", "wt", newline="") as file:
        table = csv.DictWriter(file, header, restval="")
        table.writeheader()
        table.writerows(rows)


def patient(stay: int, subject: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "patientunitstayid": stay,
        "patienthealthsystemstayid": 10_000 + stay,
        "uniquepid": subject or f"p-{stay}",
        "gender": "Female",
        "age": "61",
        "unittype": "MICU",
        "admissionheight": "165",
        "admissionweight": "70",
        "hospitaldischargeoffset": 6000,
        "hospitaldischargestatus": "Alive",
        "unitdischargeoffset": 3000,
        "unitdischargestatus": "Alive",
    } | changes


def charted(minutes: int, label: str, name: str, value: Any, stay: int = 1, entered: int = -1):
    return {
        "patientunitstayid": stay,
        "nursingchartoffset": minutes,
        "nursingchartentryoffset": minutes if entered < 0 else entered,
        "nursingchartcelltypevallabel": label,
        "nursingchartcelltypevalname": name,
        "nursingchartvalue": value,
    }


def drawn(minutes: int, name: str, result: Any, text: str = "", stay: int = 1, **changes: Any):
    return {
        "patientunitstayid": stay,
        "labresultoffset": minutes,
        "labresultrevisedoffset": minutes,
        "labname": name,
        "labresult": result,
        "labresulttext": text or result,
    } | changes


def at(table_time: str, minutes: int, stay: int = 1, **values: Any) -> dict[str, Any]:
    return {"patientunitstayid": stay, table_time: minutes} | values


@dataclass
class Extraction:
    cohort: Cohort
    items: Items
    tally: Tally

    def stay(self, episode_id: int) -> dict[str, Any]:
        return self.cohort.stays.row(
            by_predicate=pl.col("episode_id") == str(episode_id), named=True
        )

    def of(self, frame: pl.DataFrame, episode_id: int) -> pl.DataFrame:
        ids = self.cohort.stays["episode_id"].to_list()
        return frame.filter(pl.col("stay") == ids.index(str(episode_id)))

    def observed(self, variable: str, episode_id: int = 1) -> list[tuple[Any, ...]]:
        """(minutes, minutes when available, value, priority) in order."""
        rows = self.of(self.items.observations, episode_id).filter(pl.col("variable") == variable)
        minutes = (pl.col("hours", "available_hours") * 60).round(6)
        return rows.select(minutes, pl.col("value").round(6), "priority").rows()

    def happened(self, code: str, episode_id: int = 1) -> list[tuple[Any, ...]]:
        """(minutes, minutes when available, value) in order."""
        rows = self.of(self.items.events, episode_id).filter(pl.col("code") == code)
        minutes = (pl.col("hours", "available_hours") * 60).round(6)
        return rows.select(minutes, pl.col("value").round(6)).rows()


def extract(source: Path, **options: Any) -> Extraction:
    """What the engine does with a reader, in memory."""
    reader, tally = EICU(source, **options), Tally()
    cohort = reader.cohort(tally)
    stays = cohort.stays.with_row_index("stay").with_columns(pl.col("stay").cast(pl.Int32))
    items = {
        scan.name: pl.concat(scan.select(chunk.frame, tally) for chunk in scan.table.chunks())
        for scan in reader.scans(cohort)
    }
    made = reader.assemble(stays, items, tally)
    return Extraction(cohort, finish(made, stays, tally, limits=reader.limits), tally)


def exam(minutes: int, path: str, value: Any, stay: int = 1) -> dict[str, Any]:
    path = f"notes/Progress Notes/Physical Exam/Physical Exam/Neurologic/{path}/{value}"
    return at(
        "physicalexamoffset", minutes, stay, physicalexampath=path, physicalexamvalue=str(value)
    )


def order(minutes: int, name: str, stop: Any = "", **changes: Any) -> dict[str, Any]:
    times = {"drugorderoffset": minutes, "drugstopoffset": stop}
    named = {"drugname": name, "drugordercancelled": "No"}
    return at("drugstartoffset", minutes, **times, **named) | changes


def one_stay(tmp_path: Path) -> Path:
    """One stay of 50 hours with a heart rate of the monitor."""
    write(tmp_path, "patient", [patient(1)])
    write(tmp_path, "vitalPeriodic", [at("observationoffset", 5, heartrate=80)])
    return tmp_path
