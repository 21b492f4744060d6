"""MIMIC-IV: intensive care in Boston from 2008 on, as published on PhysioNet (`hosp/`, `icu/`).

Times are shifted by a whole number of years that differs by patient, so that years such as 2180 are
normal; hours within a stay are true. docs/datasets/mimic4.md says what becomes of each table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import polars as pl

from llm4ehr.store import StoreInfo
from training.data.csv_table import CsvTable, require
from training.data.extraction import Cohort, Expected, Items, Scan
from training.data.mimic import shared as mimic
from training.data.mimic.mimic4_cohort import read_cohort
from training.data.mimic.times import count_unreadable, hours_after, read_time
from training.data.sources import Tally, licence_of
from training.data.tables import load

_ID = pl.Int32
_CHART = {
    "stay_id": _ID,
    "charttime": pl.String,
    "storetime": pl.String,
    "itemid": _ID,
    "value": pl.String,
    "valuenum": pl.Float64,
}
_LABS = {
    "subject_id": _ID,
    "itemid": _ID,
    "charttime": pl.String,
    "storetime": pl.String,
    "value": pl.String,
    "valuenum": pl.Float64,
    "valueuom": pl.String,
}
_INTERVALS = {
    "stay_id": _ID,
    "starttime": pl.String,
    "endtime": pl.String,
    "itemid": _ID,
    "linkorderid": _ID,
    "statusdescription": pl.String,
}
# Never empty in the official files, so that an empty one is a damaged row.
_CHART_KEYS = ("stay_id", "itemid", "charttime")
_LAB_KEYS = ("subject_id", "itemid", "charttime")
_INTERVAL_KEYS = ("stay_id", "itemid", "starttime", "endtime")
_INPUTS = _INTERVALS | {"amount": pl.Float64, "rate": pl.Float64, "rateuom": pl.String}


class Mimic4:
    """The data set in the folder that holds `hosp/` and `icu/`."""

    limits = True
    expected = Expected(
        tasks=frozenset({"mortality", "decompensation", "remaining_los", "phenotyping"})
    )

    def __init__(self, source: Path, *, lab_delay: float | None = None) -> None:
        """`lab_delay`: hours from a sample to its result where the source does not say when that

        was there; None: half an hour for blood gases, two hours for the rest. Raises SourceError if
        a table is missing or its header does not fit, or the delay is negative.
        """
        mimic.check_lab_delay(lab_delay)
        self._source = source
        self._lab_delay = lab_delay
        self._chart_items = mimic.chart_items("strict")
        self._lab_items = mimic.lab_observation_items("strict")
        icu, hosp = source / "icu", source / "hosp"
        self._tables = {
            "chart": require(icu, "chartevents", _CHART, required=_CHART_KEYS),
            "labs": require(hosp, "labevents", _LABS, required=_LAB_KEYS),
            "inputs": require(icu, "inputevents", _INPUTS, required=_INTERVAL_KEYS),
            "procedures": require(
                icu, "procedureevents", _INTERVALS, required=(*_INTERVAL_KEYS, "statusdescription")
            ),
        }
        self.info = StoreInfo(
            source="mimic4",
            licence=licence_of(source),
            citation="Johnson AEW, Bulgarelli L, Shen L, et al. MIMIC-IV, a freely accessible "
            "electronic health record dataset. Sci Data 2023;10:1.",
            created_by="training.data.mimic.mimic4",
            label_notes={
                "mortality": "hospital_expire_flag, or a time of death of the admission.",
                "decompensation": "Time of death to the minute.",
                "remaining_los": "Hours to the end of the ICU stay, or to death if that is before.",
                "phenotyping": "25 HCUP CCS groups from the ICD-9-CM and ICD-10-CM codes of the "
                "whole admission.",
            },
            options={"lab_delay": "by category" if lab_delay is None else str(lab_delay)},
        )

    def cohort(self, tally: Tally) -> Cohort:
        """Adults who stayed in one unit, the only such stay of their admission."""
        return read_cohort(self._source, tally)

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """Charts, laboratory, infusions and procedures."""
        stays = cohort.stays.select(
            "_subject_id",
            "_stay_id",
            "_intime",
            "end_hours",
            stay=pl.int_range(pl.len(), dtype=pl.Int32),
        )
        charted = self._chart_items["itemid"].implode()

        def chart(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            rows = rows.filter(pl.col("itemid").is_in(charted)).join(
                stays, left_on="stay_id", right_on="_stay_id"
            )
            return _timed(rows, "charttime", "chartevents", tally).select(
                "stay", "itemid", "hours", "available_hours", text="value", number="valuenum"
            )

        def labs(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            # hadm_id is empty in a fifth of the rows, so that they are assigned by their time.
            rows = rows.join(stays, left_on="subject_id", right_on="_subject_id")
            rows = _timed(rows, "charttime", "labevents", tally)
            during_stay = pl.col("hours").is_between(0, pl.col("end_hours"))
            return rows.filter(during_stay).select(
                "stay", "itemid", "hours", "available_hours",
                text="value", number="valuenum", unit="valueuom",
            )  # fmt: skip

        def inputs(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            return _intervals(rows, stays, "inputevents", tally)

        def procedures(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            empty = {"amount": pl.Float64, "rate": pl.Float64, "rateuom": pl.String}
            rows = rows.with_columns(pl.lit(None, t).alias(c) for c, t in empty.items())
            return _intervals(rows, stays, "procedureevents", tally)

        selects = {"chart": chart, "labs": labs, "inputs": inputs, "procedures": procedures}
        return [Scan(name, self._tables[name], select) for name, select in selects.items()]

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """Observations and events of a block of stays."""
        dictionary = self._lab_dictionary
        labs = mimic.with_lab_delay(items["labs"], dictionary, self._lab_delay)
        labs = mimic.with_specimen(labs)
        measured, others = mimic.lab_observations(labs, self._lab_items, tally)
        charted = mimic.chart_observations(items["chart"], self._chart_items, tally)
        charted = mimic.without_lab_copies(charted, measured, stays, tally)
        made = [
            mimic.lab_events(others, dictionary, tally),
            mimic.interval_events(items["inputs"], self._labels, "INPUT", "inputevents", tally),
            mimic.interval_events(
                items["procedures"], self._labels, "PROCEDURE", "procedureevents", tally
            ),
        ]
        return Items(
            observations=pl.concat([measured, charted.select(measured.columns)]),
            events=pl.concat([events for events, _ in made]),
            codes=pl.concat([codes for _, codes in made]),
        )

    @cached_property
    def _lab_dictionary(self) -> pl.DataFrame:
        columns = {"itemid": _ID, "label": pl.String, "fluid": pl.String, "category": pl.String}
        return require(self._source / "hosp", "d_labitems", columns).read()

    @cached_property
    def _labels(self) -> pl.DataFrame:
        """`itemid` and `label` of infusions and procedures; `d_items` may be missing."""
        columns = {"itemid": _ID, "label": pl.String}
        found = CsvTable.find(self._source / "icu", "d_items", columns)
        return load("mimic_metavision", itemid=_ID) if found is None else found.read()


def _timed(rows: pl.DataFrame, column: str, table: str, tally: Tally) -> pl.DataFrame:
    """Rows with `hours` and `available_hours` (null: the source does not say).

    One in twelve store times lies before the time that the value is of: then it was known at once.
    """
    known = pl.max_horizontal(hours_after("storetime", "_intime"), "hours")
    if untimed := rows[column].null_count():
        tally.refused[f"untimed:{table}"] += untimed
    rows = _read_times(rows, (column, "storetime"), table, tally)
    rows = rows.with_columns(hours=hours_after(column, "_intime"))
    return rows.with_columns(
        available_hours=pl.when(pl.col("storetime").is_not_null()).then(known)
    ).drop_nulls("hours")


def _intervals(rows: pl.DataFrame, stays: pl.DataFrame, table: str, tally: Tally) -> pl.DataFrame:
    """Rows as `mimic.interval_events` wants them.

    The store time is left aside: a row is last stored when its interval is over.
    """
    rows = rows.join(stays, left_on="stay_id", right_on="_stay_id")
    rows = _read_times(rows, ("starttime", "endtime"), table, tally)
    return rows.select(
        "stay",
        "itemid",
        start=hours_after("starttime", "_intime"),
        end=hours_after("endtime", "_intime"),
        rate="rate",
        amount="amount",
        unit="rateuom",
        # Without order numbers, all intervals of an item that follow each other are one.
        order=pl.col("linkorderid").fill_null(-1),
        status="statusdescription",
        cancelled=pl.lit(None, pl.Int8),
    )


def _read_times(
    rows: pl.DataFrame, columns: tuple[str, ...], table: str, tally: Tally
) -> pl.DataFrame:
    read = rows.with_columns(read_time(c) for c in columns)
    count_unreadable(rows, read, columns, table, tally)
    return read
