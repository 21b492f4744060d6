"""The MEDS reader on the open demo of MIMIC-IV."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from tests.training.data.meds_source import read
from training.data.extraction import Cohort, Items
from training.data.sources import Tally


@pytest.fixture(scope="module")
def demo(llm4ehr_data: Path) -> Path:
    folder = llm4ehr_data / "mimic-iv-demo-2.2"
    if not (folder / "meds").is_dir():
        pytest.skip(f"{folder} has no meds/")
    return folder


@pytest.fixture(scope="module")
def extracted(demo: Path) -> tuple[Cohort, Items, Tally]:
    return read(demo / "meds")


class TestDemo:
    """The open demo of MIMIC-IV as MEDS: 100 patients."""

    def test_stays_are_those_of_icustays(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        stays = extracted[0].stays
        theirs = pl.read_csv(demo / "icu" / "icustays.csv.gz", try_parse_dates=True)
        assert len(stays) == len(theirs) == 140
        ours = stays.select(pl.col("subject_id").cast(pl.Int64), intime="_admission")
        assert len(theirs.join(ours, on=["subject_id", "intime"])) == 140
        days = theirs.with_columns(pl.col("subject_id").cast(pl.String)).join(
            stays, left_on=["subject_id", "intime"], right_on=["subject_id", "_admission"]
        )
        too_long = days["los"] * 24 - days["los_hours"]
        assert too_long.min() > -1e-2
        after_death = days.filter(too_long > 1e-2)
        assert len(after_death) == 12  # discharged from the ICU up to 5 hours after they died
        assert after_death["los_hours"].to_list() == after_death["death_hours_low"].to_list()

    def test_deaths_are_those_of_admissions(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        stays = extracted[0].stays
        icu = pl.read_csv(demo / "icu" / "icustays.csv.gz", try_parse_dates=True)
        died = pl.read_csv(demo / "hosp" / "admissions.csv.gz").select(
            "hadm_id", "hospital_expire_flag"
        )
        theirs = icu.join(died, on="hadm_id").select(
            pl.col("subject_id").cast(pl.String), _admission="intime", died="hospital_expire_flag"
        )
        both = stays.join(theirs, on=["subject_id", "_admission"])
        assert len(both) == 140
        assert both["mortality"].cast(pl.Int64).to_list() == both["died"].to_list()
        assert both["died"].sum() == 20

    def test_heart_rates_are_those_of_chartevents(
        self, demo: Path, extracted: tuple[Cohort, Items, Tally]
    ) -> None:
        cohort, items, _ = extracted
        charted = pl.read_csv(demo / "icu" / "chartevents.csv.gz", infer_schema=False).filter(
            itemid="220045"
        )
        charted = charted.select(
            "subject_id",
            pl.col("charttime").str.to_datetime("%Y-%m-%d %H:%M:%S"),
            pl.col("valuenum").cast(pl.Float64),
        )
        for name in ("10000032-1", "10001217-2", "10019003-1"):
            row = cohort.stays.with_row_index("stay").row(
                by_predicate=pl.col("episode_id") == name, named=True
            )
            inside = charted.filter(
                pl.col("charttime").is_between(
                    row["_admission"], row["_admission"] + timedelta(hours=row["end_hours"])
                ),
                subject_id=row["subject_id"],
            )
            ours = items.observations.filter(variable="hr", stay=row["stay"])
            assert len(ours) >= 10
            assert sorted(ours["value"]) == sorted(inside["valuenum"])

    def test_first_hours_of_a_stay(self, extracted: tuple[Cohort, Items, Tally]) -> None:
        """Row numbers are those of the event file, from 0."""
        cohort, items, _ = extracted
        stay = cohort.stays.with_row_index("stay").row(
            by_predicate=pl.col("episode_id") == "10000032-1", named=True
        )
        assert stay["_admission"] == datetime.fromisoformat("2180-07-23T14:00")  # row 568
        assert stay["los_hours"] == pytest.approx(9 + 50 / 60 + 47 / 3600)  # row 1094
        assert stay["age_years"] == pytest.approx(52.56, abs=0.01)  # row 0: born 2128-01-01
        assert stay["unit_type"] == "medical"
        assert stay["mortality"] is False
        rates = items.observations.filter(variable="hr", stay=stay["stay"]).sort("hours")
        # Rows 576, 668, 741 and 756; the first three are lines 13, 97 and 157 of chartevents.
        assert rates["value"].head(4).to_list() == [91.0, 93.0, 94.0, 105.0]
        assert rates["hours"].head(4).to_list() == pytest.approx([0.2, 0.5, 1.0, 2.0])
        creatinine = items.events.filter(code="LOINC/2160-0", stay=stay["stay"])
        assert creatinine.select("hours", "available_hours", "value").rows() == [
            (7.75, 9.75, 0.5)  # row 1052
        ]

    def test_counts(self, extracted: tuple[Cohort, Items, Tally]) -> None:
        _, items, tally = extracted
        counts = dict(items.observations["variable"].value_counts().rows())
        assert counts == {
            "dbp": 14333, "fio2": 1855, "gcs_total": 3269, "glucose": 2737, "hr": 13863,
            "mbp": 14357, "ph": 816, "rr": 15175, "sbp": 14332, "spo2": 13596, "temp": 3753,
        }  # fmt: skip
        assert not items.events["code"].str.contains("DIAGNOSIS|DEATH|DISCHARGE|DIED").any()
        assert tally.refused["no-value:glucose"] == 0
