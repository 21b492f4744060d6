"""MIMIC-III v1.4, also its open demo, from the tables as published (CSV or gzipped CSV).

docs/datasets/mimic3.md has the rules and where they differ from the MIMIC-III benchmark
(Harutyunyan et al. 2019). The profile "benchmark" follows the benchmark, quirks included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from llm4ehr.store import StoreInfo
from training.data.csv_table import require
from training.data.extraction import Cohort, Expected, Items, Scan
from training.data.mimic.mimic3_benchmark import benchmark_observations
from training.data.mimic.mimic3_cohort import read_cohort, rows_of_stays
from training.data.mimic.mimic3_published import PUBLISHED
from training.data.mimic.shared import (
    LAB_DELAY_HOURS,
    chart_items,
    chart_observations,
    check_lab_delay,
    interval_events,
    lab_events,
    lab_observation_items,
    lab_observations,
    with_lab_delay,
    with_specimen,
    without_lab_copies,
)
from training.data.mimic.times import count_unreadable, hours_after, read_time
from training.data.sources import SourceError, Tally, licence_of

Profile = Literal["strict", "benchmark"]

_ID = pl.Int32
_KEYS = {"subject_id": _ID, "hadm_id": _ID}
_CHART_COLUMNS = {
    **_KEYS,
    "icustay_id": _ID,
    "itemid": pl.Int32,
    "charttime": pl.String,
    "storetime": pl.String,
    "value": pl.String,
    "valuenum": pl.Float64,
    "valueuom": pl.String,
    "error": pl.Int8,
}
_LAB_COLUMNS = {
    **_KEYS,
    "itemid": pl.Int32,
    "charttime": pl.String,
    "value": pl.String,
    "valuenum": pl.Float64,
    "valueuom": pl.String,
}
_ORDER_COLUMNS = {
    **_KEYS,
    "icustay_id": _ID,
    "itemid": pl.Int32,
    "starttime": pl.String,
    "endtime": pl.String,
    "linkorderid": pl.Int32,
    "cancelreason": pl.Int8,
    "statusdescription": pl.String,
    "amount": pl.Float64,
    "rate": pl.Float64,
    "rateuom": pl.String,
}
# Never empty in the official files, so that an empty one is a damaged row.
_RESULT_KEYS = ("subject_id", "itemid", "charttime")
_ORDER_KEYS = ("subject_id", "itemid", "starttime", "endtime", "statusdescription")
_LABEL_NOTES = {
    "mortality": (
        "Death in hospital: a DEATHTIME in ADMISSIONS, or a DOD between the dates of admission and "
        "discharge (profile benchmark: the dates of death compared as times, so a midnight)."
    ),
    "decompensation": (
        "From DEATHTIME, exact. A death in hospital without one lies on the day of DOD (profile "
        "benchmark: at an unknown time)."
    ),
    "remaining_los": (
        "From ICU admission (INTIME) to the earlier of OUTTIME and DEATHTIME (profile benchmark: "
        "24 x LOS)."
    ),
    "phenotyping": (
        "25 CCS groups of the ICD-9 codes of the hospital admission, which are assigned after "
        "discharge."
    ),
}
_CITATION = (
    "Johnson AEW, et al. MIMIC-III, a freely accessible critical care database. Sci Data "
    "2016;3:160035, doi:10.1038/sdata.2016.35. MIMIC-III Clinical Database v1.4, PhysioNet, "
    "doi:10.13026/C2XW26; its demo, doi:10.13026/C2HM2Q. Cohort and labels: Harutyunyan H, et al. "
    "Multitask learning and benchmarking with clinical time series data. Sci Data 2019;6:96."
)


class Mimic3:
    """MIMIC-III as a source of an extraction (`TableReader`)."""

    def __init__(
        self, source: Path, *, profile: Profile = "strict", lab_delay: float | None = None
    ) -> None:
        """Find the tables in the folder `source`.

        `lab_delay`: hours from drawing a sample to its result; None: `LAB_DELAY_HOURS`, and 0 in
        the profile benchmark. Raises SourceError for a missing table or an impossible option.
        """
        if profile not in get_args(Profile):
            raise SourceError(f"mimic3 has no profile {profile!r}; it has strict and benchmark")
        check_lab_delay(lab_delay)
        self._source = source
        self._benchmark = profile == "benchmark"
        self._lab_delay = 0.0 if self._benchmark and lab_delay is None else lab_delay
        self._chart_items = chart_items(profile)
        self._lab_items = lab_observation_items(profile)
        self._charts = require(source, "CHARTEVENTS", _CHART_COLUMNS, required=_RESULT_KEYS)
        self._labs = require(source, "LABEVENTS", _LAB_COLUMNS, required=_RESULT_KEYS)
        self._inputs = require(source, "INPUTEVENTS_MV", _ORDER_COLUMNS, required=_ORDER_KEYS)
        self._procedures = require(
            source,
            "PROCEDUREEVENTS_MV",
            _ORDER_COLUMNS,
            required=_ORDER_KEYS,
            absent_ok=("rate", "rateuom", "amount"),
        )
        labels = require(source, "D_ITEMS", {"itemid": pl.Int32, "label": pl.String})
        self._labels = labels.read().drop_nulls()
        lab_columns = {
            "itemid": pl.Int32,
            **dict.fromkeys(("label", "fluid", "category"), pl.String),
        }
        self._lab_dictionary = require(source, "D_LABITEMS", lab_columns).read()
        self.limits = not self._benchmark
        self.expected = Expected(tasks=frozenset(_LABEL_NOTES), published=PUBLISHED)
        delays = ", ".join(f"{kind} {hours} h" for kind, hours in LAB_DELAY_HOURS.items())
        self.info = StoreInfo(
            source="mimic3",
            licence=licence_of(source),
            citation=_CITATION,
            created_by="training.data.mimic.mimic3",
            label_notes=_LABEL_NOTES,
            options={
                "profile": profile,
                "lab_delay": delays if self._lab_delay is None else f"{self._lab_delay} h",
            },
        )

    def cohort(self, tally: Tally) -> Cohort:
        """See `mimic3_cohort.read_cohort`."""
        return read_cohort(self._source, benchmark=self._benchmark, tally=tally)

    def scans(self, cohort: Cohort) -> Sequence[Scan]:
        """Charts, laboratory, infusions and procedures."""

        def charts(chunk: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            # Most of the 330 million rows are other items, so they go first.
            rows = chunk.filter(pl.col("itemid").is_in(self._chart_items["itemid"].implode()))
            rows = rows_of_stays(rows, cohort, "CHARTEVENTS", tally)
            if not self._benchmark:
                valid = rows.filter(pl.col("error").fill_null(0) != 1)
                _count(tally, "charted-in-error:CHARTEVENTS", rows, valid)
                rows = valid
            rows = _hours(rows, "charttime", "CHARTEVENTS", tally)
            stored = pl.max_horizontal(hours_after("storetime", "_intime"), "hours")
            rows = rows.with_columns(read_time("storetime")).with_columns(
                available_hours=pl.lit(None, pl.Float64) if self._benchmark else stored
            )
            return _result_columns(rows)

        def laboratory(chunk: pl.DataFrame, tally: Tally) -> pl.DataFrame:
            rows = rows_of_stays(chunk, cohort, "LABEVENTS", tally)
            rows = _hours(rows, "charttime", "LABEVENTS", tally)
            return _result_columns(rows.with_columns(available_hours=pl.lit(None, pl.Float64)))

        def orders(table: str) -> Callable[[pl.DataFrame, Tally], pl.DataFrame]:
            def select(chunk: pl.DataFrame, tally: Tally) -> pl.DataFrame:
                rows = rows_of_stays(chunk, cohort, table, tally)
                rows = _hours(rows, "starttime", table, tally)
                text = rows
                rows = rows.with_columns(read_time("endtime"))
                count_unreadable(text, rows, ["endtime"], table, tally)
                return rows.select(
                    "stay",
                    "itemid",
                    "rate",
                    "amount",
                    start="hours",
                    end=hours_after("endtime", "_intime"),
                    unit="rateuom",
                    order="linkorderid",
                    status="statusdescription",
                    cancelled="cancelreason",
                )

            return select

        return (
            Scan("charts", self._charts, charts),
            Scan("laboratory", self._labs, laboratory),
            Scan("infusions", self._inputs, orders("INPUTEVENTS_MV")),
            Scan("procedures", self._procedures, orders("PROCEDUREEVENTS_MV")),
        )

    def assemble(
        self, stays: pl.DataFrame, items: Mapping[str, pl.DataFrame], tally: Tally
    ) -> Items:
        """Observations, events and codes of a block of stays."""
        charts = items["charts"]
        labs = with_specimen(items["laboratory"])
        if self._lab_delay != 0:
            labs = with_lab_delay(labs, self._lab_dictionary, self._lab_delay)
        if self._benchmark:
            mapped = pl.concat([self._chart_items, self._lab_items])
            is_variable = pl.col("itemid").is_in(self._lab_items["itemid"].implode())
            of_labs = labs.filter(is_variable).select(charts.columns)
            observations = benchmark_observations(pl.concat([charts, of_labs]), mapped, tally)
            labs = labs.filter(~is_variable)
        else:
            measured, labs = lab_observations(labs, self._lab_items, tally)
            charted = chart_observations(charts, self._chart_items, tally)
            charted = without_lab_copies(charted, measured, stays, tally)
            observations = pl.concat([charted, measured])
        made = (
            lab_events(labs, self._lab_dictionary, tally),
            interval_events(items["infusions"], self._labels, "INPUT", "INPUTEVENTS_MV", tally),
            interval_events(
                items["procedures"], self._labels, "PROCEDURE", "PROCEDUREEVENTS_MV", tally
            ),
        )
        events, codes = (pl.concat(frames) for frames in zip(*made, strict=True))
        return Items(observations, events, codes)


def _hours(rows: pl.DataFrame, column: str, table: str, tally: Tally) -> pl.DataFrame:
    """The rows with `hours` since ICU admission; rows whose time cannot be read are dropped."""
    read = rows.with_columns(read_time(column)).with_columns(hours=hours_after(column, "_intime"))
    timed = read.drop_nulls("hours")
    _count(tally, f"unreadable-time:{table}", read, timed)
    return timed


def _result_columns(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(
        "stay",
        "itemid",
        "hours",
        "available_hours",
        text="value",
        number="valuenum",
        unit="valueuom",
    )


def _count(tally: Tally, reason: str, before: pl.DataFrame, after: pl.DataFrame) -> None:
    if len(after) < len(before):
        tally.refused[reason] += len(before) - len(after)
