"""The eICU reader: rules on a tiny synthetic set, golden values and oracle counts on the demo."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm4ehr.store import EpisodeStore
from training.data.build import build_store
from training.data.cleaning import finish
from training.data.codes import CODES
from training.data.eicu.drugs import drug_name
from training.data.eicu.events import lab_codes
from training.data.eicu.files import COLUMNS
from training.data.eicu.reader import EICU
from training.data.extraction import Cohort, Items
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally
from training.progress import progress_bar

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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One stay of 50 hours with a heart rate of the monitor."""
    write(tmp_path, "patient", [patient(1)])
    write(tmp_path, "vitalPeriodic", [at("observationoffset", 5, heartrate=80)])
    return tmp_path


# -------------------------------------------------------------------------------- cohort and labels


def test_strict_cohort_and_its_waterfall(tmp_path: Path) -> None:
    write(
        tmp_path,
        "patient",
        [
            patient(1, age="> 89"),
            patient(2, age="17"),
            patient(3, age=""),
            patient(4, unitdischargeoffset=59),
            patient(5, unitdischargeoffset=""),
            # Two unit stays of one hospital stay.
            patient(6, "twice", patienthealthsystemstayid=77),
            patient(7, "twice", patienthealthsystemstayid=77),
            # Two hospital stays of one patient, the second with a record of no length beside it.
            patient(8, "again"),
            patient(9, "again", patienthealthsystemstayid=88),
            patient(10, "again", patienthealthsystemstayid=88, unitdischargeoffset=0),
        ],
        suffix=".csv.gz",
    )
    write(tmp_path, "vitalPeriodic", [])
    cohort = EICU(tmp_path).cohort(Tally())
    assert cohort.stays["episode_id"].to_list() == ["1", "8", "9"]
    assert [(s.stays, s.subjects) for s in cohort.waterfall] == [
        (10, 7),
        (8, 5),
        (7, 4),
        (5, 3),
        (3, 2),
    ]
    assert cohort.waterfall[0].published_stays == 200_859
    first, again, _ = cohort.stays.iter_rows(named=True)
    assert first["age_years"] == 90
    assert (again["sex"], again["unit_type"], again["los_hours"]) == ("female", "medical", 50)
    assert (again["n_hours"], again["end_hours"]) == (50, 50)
    assert cohort.stays.filter(subject_id="again")["split"].n_unique() == 1
    assert cohort.stays["benchmark_split"].null_count() == 3


@pytest.mark.parametrize(
    ("unit", "hospital", "mortality", "death"),
    [
        ("Alive", "Alive", False, None),
        ("Alive", "Expired", True, 100.0),  # hospital discharge after 6,000 minutes
        ("Expired", "Expired", True, 50.0),  # unit discharge after 3,000 minutes
        ("Alive", "", None, None),
        ("Expired", "", True, 50.0),
        ("Expired", "Alive", None, None),
    ],
)
def test_death(
    source: Path, unit: str, hospital: str, mortality: bool | None, death: float | None
) -> None:
    changes = {"unitdischargestatus": unit, "hospitaldischargestatus": hospital}
    write(source, "patient", [patient(1, **changes)])
    tally = Tally()
    stay = EICU(source).cohort(tally).stays.row(0, named=True)
    assert stay["mortality"] is mortality
    assert stay["death_hours_low"] == death
    assert (stay["death_hours_high"] is None) is (death is None)
    contradictory = (unit, hospital) == ("Expired", "Alive")
    assert tally.refused["contradictory-outcome:mortality"] == contradictory


def test_a_patient_who_left_the_unit_did_not_die_before(source: Path) -> None:
    died = {"hospitaldischargestatus": "Expired", "hospitaldischargeoffset": 2000}
    write(source, "patient", [patient(1, **died)])
    tally = Tally()
    assert EICU(source).cohort(tally).stays["death_hours_low"].to_list() == [50.0]
    assert tally.repaired["before-unit-discharge:death"] == 1


def test_phenotypes_by_the_first_icd9_code_else_icd10(tmp_path: Path) -> None:
    write(tmp_path, "patient", [patient(i) for i in range(1, 7)])
    write(tmp_path, "vitalPeriodic", [])
    write(
        tmp_path,
        "diagnosis",
        [
            at("diagnosisoffset", 10, 1, icd9code="038.9, A41.9"),
            at("diagnosisoffset", -5, 1, icd9code="I50.9, 428.0"),  # the ICD-9 code stands second
            at("diagnosisoffset", 10, 2, icd9code="E87.1"),  # ICD-10 alone: hyponatraemia
            at("diagnosisoffset", 10, 3, icd9code="31.1"),  # a procedure
            at("diagnosisoffset", 10, 4, icd9code=""),
            at("diagnosisoffset", 10, 5, icd9code="V08, R75"),  # coded, but none of the 25
        ],
    )
    tally = Tally()
    stays = EICU(tmp_path).cohort(tally).stays
    sepsis, failure = "Septicemia (except in labor)", "Congestive heart failure; nonhypertensive"
    assert stays["phenotypes"].to_list() == [
        [failure, sepsis],
        ["Fluid and electrolyte disorders"],
        None,
        None,
        [],
        None,
    ]
    assert tally.refused["unknown-code:diagnosis"] == 1
    assert tally.repaired["icd-10-only:diagnosis"] == 1


# ------------------------------------------------------------------------------------- observations

GCS = "Glasgow coma score"


def test_nurse_charting(source: Path) -> None:
    write(
        source,
        "nurseCharting",
        [
            charted(60, "Heart Rate", "Heart Rate", "88", entered=75),
            charted(61, "Heart Rate", "Heart Rate", "90", entered=3001),  # known after the end
            charted(62, "Heart Rate", "Heart Rate", "unable"),
            charted(63, "Heart Rate", "Heart Rate", "0"),
            charted(60, "O2 Saturation", "O2 Saturation", "97"),
            charted(60, "Respiratory Rate", "Respiratory Rate", "18"),
            charted(60, "MAP (mmHg)", "Value", "70"),
            charted(60, "Arterial Line MAP (mmHg)", "Value", "72"),
            charted(90, "Non-Invasive BP", "Non-Invasive BP Mean", "75"),
            charted(90, "Invasive BP", "Invasive BP Mean", "77"),
            charted(60, "Invasive BP", "Invasive BP Systolic", "121"),
            charted(60, "Non-Invasive BP", "Non-Invasive BP Systolic", "118"),
            charted(60, "Non-Invasive BP", "Non-Invasive BP Diastolic", "59"),
            charted(60, "Temperature", "Temperature (C)", "37.1"),
            charted(60, "Temperature", "Temperature (F)", "98.9"),  # computed from the other
            charted(90, "Temperature", "Temperature (F)", "98.6"),
            charted(60, "Temperature", "Temperature Location", "oral"),
            charted(60, GCS, "GCS Total", "9"),
            charted(60, GCS, "Eyes", "4"),
            charted(90, GCS, "Eyes", "2"),
            charted(90, GCS, "Motor", "5", entered=100),
            charted(90, GCS, "Verbal", "1"),
            charted(95, "Score (Glasgow Coma Scale)", "Value", "11"),
            charted(96, GCS, "GCS Total", "Unable to score due to medication"),
            charted(60, "Pain Score", "Eyes", "3"),  # a name of the coma score elsewhere
            charted(60, "Heart Rate", "Heart Rate", "70", stay=99),  # not of the cohort
        ],
    )
    found = extract(source)
    assert found.observed("hr") == [(5, None, 80, 0), (60, 75, 88, 0)]
    assert found.observed("spo2") == [(60, None, 97, 0)]
    assert found.observed("rr") == [(60, None, 18, 0)]
    assert found.observed("mbp") == [
        (60, None, 72, 0),
        (60, None, 70, 1),
        (90, None, 77, 0),
        (90, None, 75, 1),
    ]
    assert found.observed("sbp") == [(60, None, 121, 0), (60, None, 118, 1)]
    assert found.observed("dbp") == [(60, None, 59, 1)]
    assert found.observed("temp") == [(60, None, 37.1, 0), (90, None, 37, 0)]
    assert found.observed("gcs_total") == [(60, None, 9, 0), (90, 100, 8, 0), (95, None, 11, 0)]
    assert found.tally.refused["not-a-number:hr"] == 1
    assert found.tally.refused["no-score:gcs_total"] == 1
    assert found.tally.refused["zero:hr"] == 1
    assert found.tally.refused["after-end:observation"] == 1
    # The computed temperature, and the sum of components beside a total.
    assert found.tally.refused["second-source:observation"] == 2


def test_the_monitor_goes_before_nurse_charting(source: Path) -> None:
    arterial = {"systemicsystolic": 130, "systemicdiastolic": 60, "systemicmean": 83}
    cuff = {"noninvasivesystolic": 110, "noninvasivediastolic": 55, "noninvasivemean": 73}
    rest = {"heartrate": 81, "respiration": 17, "sao2": 96, "temperature": 98.6}
    write(source, "vitalPeriodic", [at("observationoffset", 60, **arterial, **rest)])
    write(source, "vitalAperiodic", [at("observationoffset", 60, **cuff)])
    write(
        source,
        "nurseCharting",
        [
            charted(60, "Invasive BP", "Invasive BP Systolic", "128"),
            charted(61, "Invasive BP", "Invasive BP Systolic", "127"),
            charted(60, "Non-Invasive BP", "Non-Invasive BP Systolic", "111"),
            charted(60, "Heart Rate", "Heart Rate", "82"),
            charted(61, "Heart Rate", "Heart Rate", "83"),
        ],
    )
    found = extract(source)
    assert found.observed("sbp") == [(60, None, 130, 0), (60, None, 110, 1), (61, None, 127, 0)]
    assert found.observed("dbp") == [(60, None, 60, 0), (60, None, 55, 1)]
    assert found.observed("mbp") == [(60, None, 83, 0), (60, None, 73, 1)]
    assert found.observed("hr") == [(60, None, 81, 0), (61, None, 83, 0)]
    assert found.observed("temp") == [(60, None, 37, 0)]  # Fahrenheit, mended by its range
    assert found.tally.refused["second-source:observation"] == 3


def test_a_value_that_cannot_be_true_takes_no_place(source: Path) -> None:
    impossible = {"heartrate": 0, "sao2": 120, "temperature": 60}
    write(source, "vitalPeriodic", [at("observationoffset", 60, **impossible)])
    write(
        source,
        "nurseCharting",
        [
            charted(60, "Heart Rate", "Heart Rate", "80"),
            charted(60, "O2 Saturation", "O2 Saturation", "97"),
            charted(60, "Temperature", "Temperature (C)", "98"),  # Fahrenheit, and can be true
            charted(60, "Temperature", "Temperature (F)", "98.6"),
        ],
    )
    found = extract(source)
    assert found.observed("hr") == [(60, None, 80, 0)]
    assert found.observed("spo2") == [(60, None, 97, 0)]
    assert found.observed("temp") == [(60, None, round(66 * 5 / 9, 6), 0)]
    assert found.tally.refused["zero:hr"] == 1
    assert found.tally.refused["outside-limits:spo2"] == 1
    assert found.tally.refused["outside-limits:temp"] == 1
    assert found.tally.refused["second-source:observation"] == 1


def test_fahrenheit_is_converted_once(source: Path) -> None:
    rows = [charted(60, "Temperature", "Temperature (F)", "190")]
    write(source, "nurseCharting", [*rows, charted(90, "Temperature", "Temperature (F)", "104")])
    found = extract(source)
    assert found.observed("temp") == [(90, None, 40, 0)]
    assert found.tally.refused["outside-limits:temp"] == 1
    assert found.tally.repaired["fahrenheit:temp"] == 0


def test_a_value_known_later_takes_no_place(source: Path) -> None:
    named = {"respchartvaluelabel": "FiO2", "respchartvalue": "40"}
    entered = [(60, 600), (120, 125), (180, 3001)]
    rows = [at("respchartoffset", m, respchartentryoffset=e, **named) for m, e in entered]
    write(source, "respiratoryCharting", rows)
    write(source, "lab", [drawn(m, "FiO2", 50, labresultrevisedoffset=m + 5) for m, _ in entered])
    found = extract(source)
    assert found.observed("fio2") == [
        (60, 600, 0.4, 0),
        (60, 65, 0.5, 0),
        (120, 125, 0.4, 0),
        (180, 185, 0.5, 0),  # the other was entered after the end
    ]
    assert found.tally.refused["second-source:observation"] == 1
    assert found.tally.refused["after-end:observation"] == 1


_known = st.tuples(
    st.sampled_from(["charted", "monitor", "total", "component"]),
    st.integers(0, 2),
    st.integers(0, 5),
    st.sampled_from([0, 3, 15, 80, 400]),
)


@settings(max_examples=30)
@given(st.lists(_known, max_size=12))
def test_every_minute_keeps_its_best_value_at_each_time_it_was_known(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, int, int]]
) -> None:
    """Whenever a possible value of a source was known, one of a source as good is kept."""
    source = tmp_path_factory.mktemp("eicu")
    write(source, "patient", [patient(1)])
    monitor = [at("observationoffset", m, heartrate=v) for s, m, _, v in rows if s == "monitor"]
    write(source, "vitalPeriodic", monitor)
    names = {
        "charted": ("Heart Rate", "Heart Rate"),
        "total": (GCS, "GCS Total"),
        "component": (GCS, "Motor"),
    }
    charts = [charted(m, *names[s], v, entered=m + e) for s, m, e, v in rows if s in names]
    write(source, "nurseCharting", charts)
    found = extract(source)
    kept = [(m, known or m) for m, known, *_ in found.observed("hr")]
    for kind, minute, later, value in rows:
        if kind in ("charted", "monitor") and 0 < value <= 350:
            known = minute + later if kind == "charted" else minute
            assert any(m == minute and k <= known for m, k in kept)
    totals = [(m, known or m) for m, known, *_ in found.observed("gcs_total")]
    for kind, minute, later, value in rows:
        if kind == "total" and 3 <= value <= 15:
            assert any(m == minute and k <= minute + later for m, k in totals)


def test_oxygen(source: Path) -> None:
    def set_to(minutes: int, label: str, value: str, entered: int) -> dict[str, Any]:
        entry = {"respchartentryoffset": entered}
        named = {"respchartvaluelabel": label, "respchartvalue": value}
        return at("respchartoffset", minutes, **entry, **named)

    write(
        source,
        "respiratoryCharting",
        [
            set_to(60, "FiO2", "40", 60),
            set_to(70, "FIO2 (%)", "60%", 85),
            set_to(80, "O2 Percentage", "0.5", 79),  # entered before it was true
            set_to(90, "Set Fraction of Inspired Oxygen (FIO2)", "100", 90),
            set_to(95, "FiO2", "4", 95),
            set_to(60, "LPM O2", "40", 60),
        ],
    )
    gas = {"labmeasurenameinterface": "%"}
    write(
        source,
        "lab",
        [
            drawn(60, "FiO2", 45, **gas),
            drawn(120, "FiO2", 10000, "100.0", **gas),
            drawn(130, "FiO2", 40, labmeasurenameinterface="LPM"),
        ],
    )
    found = extract(source)
    assert found.observed("fio2") == [
        (60, None, 0.4, 0),
        (70, 85, 0.6, 0),
        (80, None, 0.5, 0),
        (90, None, 1, 0),
        (120, None, 1, 0),
    ]
    assert found.tally.refused["outside-limits:fio2"] == 1
    assert found.tally.refused["flow:fio2"] == 1
    assert found.tally.repaired["hundredfold:fio2"] == 1
    assert found.tally.repaired["entered-before-true:respiratoryCharting"] == 1


def exam(minutes: int, path: str, value: Any, stay: int = 1) -> dict[str, Any]:
    path = f"notes/Progress Notes/Physical Exam/Physical Exam/Neurologic/{path}/{value}"
    return at(
        "physicalexamoffset", minutes, stay, physicalexampath=path, physicalexamvalue=str(value)
    )


def test_coma_score_of_the_physical_exam(source: Path) -> None:
    write(
        source,
        "physicalExam",
        [
            exam(60, "GCS/Score", "scored"),
            exam(60, "GCS/Eyes Score", 3),
            exam(60, "GCS/Verbal Score", 2),
            exam(60, "GCS/Motor Score", 5),
            exam(120, "GCS/Eyes Score", 1),  # the others are carried for six hours
            exam(600, "GCS/Motor Score", 4),  # now the others are taken as normal
            exam(700, "GCS", 14),
            exam(700, "GCS/Eyes Score", 1),
            exam(710, "GCS/Eyes Score", 5),  # there is no such score
            exam(720, "GCS/Mental Status/Affect", "calm"),
            exam(730, "Pupils/Score", 3),
        ],
    )
    found = extract(source)
    assert found.observed("gcs_total") == [
        (60, None, 10, 0),
        (120, None, 8, 0),
        (600, None, 13, 0),
        (700, None, 14, 0),
    ]
    assert found.tally.refused["outside-limits:gcs component"] == 1


def test_glucose_stands_at_its_own_time_and_is_known_when_it_was_filed(source: Path) -> None:
    write(
        source,
        "lab",
        [
            drawn(60, "glucose", 100, labresultrevisedoffset=95),
            drawn(61, "glucose", 200, labresultrevisedoffset=50),  # filed before it was drawn
            drawn(62, "bedside glucose", "", ">600"),
            drawn(63, "pH", 7.31, labresultrevisedoffset=70),
            drawn(64, "glucose - CSF", 59),
        ],
    )
    found = extract(source)
    assert found.observed("glucose") == [(60, 95, 100, 0), (61, None, 200, 0), (62, None, 600, 1)]
    assert found.observed("ph") == [(63, 70, 7.31, 0)]
    assert found.tally.repaired["entered-before-true:lab"] == 1
    assert found.tally.repaired["limit-of-assay:lab"] == 1
    assert found.items.events["code"].to_list() == ["EICU/LAB/glucose_-_CSF"]


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 60), st.integers(50, 400)), max_size=8)
)
def test_no_glucose_is_known_before_it_was_filed(
    tmp_path_factory: pytest.TempPathFactory, results: list[tuple[int, int, int]]
) -> None:
    source = tmp_path_factory.mktemp("eicu")
    write(source, "patient", [patient(1)])
    write(source, "vitalPeriodic", [])
    rows = [drawn(m, "glucose", v, labresultrevisedoffset=m + later) for m, later, v in results]
    write(source, "lab", rows)
    # Of copies, the one that was known first.
    filed: dict[tuple[int, int], int] = {}
    for m, later, v in results:
        filed[m, v] = min(m + later, filed.get((m, v), 3001))
    assert {
        (m, m if known is None else known, v)
        for m, known, v, _ in extract(source).observed("glucose")
    } == {(m, known, v) for (m, v), known in filed.items() if known <= 3000}


# ------------------------------------------------------------------------------------------- events


def test_laboratory_events(source: Path) -> None:
    usual = {"labmeasurenamesystem": "mg/dL"}
    write(
        source,
        "lab",
        [
            drawn(60, "creatinine", 1.2, labresultrevisedoffset=99, **usual),
            drawn(70, "creatinine", 88, labmeasurenamesystem="umol/L"),
            drawn(60, "ionized calcium", 4.8, "1.20", labmeasurenameinterface="mmol/L", **usual),
            drawn(61, "ionized calcium", 1.17, labmeasurenameinterface="MMOL/L", **usual),
            drawn(60, "magnesium", 1.4, "1.40", labmeasurenameinterface="meq/L", **usual),
            drawn(60, "CRP", 1148, "114.8", labmeasurenameinterface="mg/L", **usual),
            drawn(60, "troponin - I", "", "<0.02", labmeasurenamesystem="ng/mL"),
            drawn(60, "Temperature", 98.6, labmeasurenamesystem="&#176;C"),
            drawn(60, "Device", "", "nasal cannula"),
            drawn(60, "a new assay", 5, labmeasurenamesystem="mg/L"),
            # Revised: the last version stands, from when it was known.
            drawn(80, "Hgb", 8.3, labresultrevisedoffset=90),
            drawn(80, "Hgb", 8.0, labresultrevisedoffset=130),
        ],
    )
    found = extract(source)
    assert found.happened("LOINC/2160-0") == [(60, 99, 1.2)]
    assert found.happened("LOINC/2160-0//umol/L") == [(70, None, 88)]
    assert found.happened("LOINC/1994-3") == [(60, None, 1.197665), (61, None, 1.17)]
    assert found.happened("LOINC/19123-9") == [(60, None, 1.70142)]
    assert found.happened("EICU/LAB/CRP") == [(60, None, 11.48)]
    assert found.happened("LOINC/10839-9") == [(60, None, 0.02)]
    assert found.happened("EICU/LAB/Temperature") == [(60, None, 37)]
    assert found.happened("EICU/LAB/a_new_assay//mg/L") == [(60, None, 5)]
    assert found.happened("LOINC/718-7") == [(80, 130, 8.0)]
    assert found.tally.refused["result-in-words:lab"] == 1
    codes = {code: (words, unit) for code, words, unit in found.items.codes.iter_rows()}
    assert codes["LOINC/2160-0"] == CODES["LOINC/2160-0"]
    assert codes["LOINC/2160-0//umol/L"] == (CODES["LOINC/2160-0"].descriptor, None)
    assert codes["EICU/LAB/CRP"] == ("c reactive protein", "mg/dL")
    assert codes["EICU/LAB/a_new_assay//mg/L"] == ("a new assay", None)


def order(minutes: int, name: str, stop: Any = "", **changes: Any) -> dict[str, Any]:
    times = {"drugorderoffset": minutes, "drugstopoffset": stop}
    named = {"drugname": name, "drugordercancelled": "No"}
    return at("drugstartoffset", minutes, **times, **named) | changes


def test_orders(source: Path) -> None:
    write(
        source,
        "medication",
        [
            order(60, "2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", 300, drugorderoffset=75),
            order(70, "ondansetron (ZOFRAN) injection 4 mg", 0),
            order(80, "Ondansetron", 70),
            order(90, "ONDANSETRON", 500, drugordercancelled="Yes"),
            order(95, "", 120, drughiclseqno=33598),
            order(96, "Zofran", drughiclseqno=33598, drugordercancelled="Yes"),
            order(97, "Zofran 4 mg", drughiclseqno=33598, drugordercancelled="Yes"),
            order(98, "Ondansetron inj", drughiclseqno=33598, drugordercancelled="Yes"),
            order(99, "", drughiclseqno=1),
            order(99, ""),
        ],
    )
    found = extract(source)
    assert found.happened("EICU/ORDER/ondansetron") == [
        (60, 75, None),
        (70, None, None),
        (80, None, None),
    ]
    assert found.happened("EICU/ORDER_END/ondansetron") == [(300, None, None)]
    # Without a name, an order is called as most orders of its ingredient are.
    assert found.happened("EICU/ORDER/zofran") == [(95, None, None)]
    assert found.happened("EICU/ORDER/hicl_1") == [(99, None, None)]
    assert found.tally.refused["cancelled:medication"] == 4
    assert found.tally.refused["no-name:medication"] == 1
    assert found.tally.repaired["no-stop:medication"] == 3
    codes = dict(found.items.codes.select("code", "descriptor").iter_rows())
    assert codes["EICU/ORDER_END/ondansetron"] == "end of the order of ondansetron"


def test_infusions(source: Path) -> None:
    write(
        source,
        "infusionDrug",
        [
            at("infusionoffset", 60, drugname="Norepinephrine (mcg/min)", drugrate="8"),
            at("infusionoffset", 60, drugname="Norepinephrine (ml/hr)", drugrate="15"),
            at("infusionoffset", 90, drugname="Norepinephrine (mcg/min)", drugrate="OFF"),
            at("infusionoffset", 95, drugname="Norepinephrine ()", drugrate="8"),
            at("infusionoffset", 60, drugname="Insulin 100 units in NS (units/hr)", drugrate="2"),
            at("infusionoffset", 60, drugname="", drugrate="2"),
        ],
    )
    found = extract(source)
    assert found.happened("EICU/INFUSION/norepinephrine//mcg/min") == [
        (60, None, 8),
        (90, None, None),
    ]
    assert found.happened("EICU/INFUSION/norepinephrine//ml/hr") == [(60, None, 15)]
    # A rate without a unit is not a number.
    assert found.happened("EICU/INFUSION/norepinephrine") == [(95, None, None)]
    units = dict(found.items.codes.select("code", "unit").iter_rows())
    assert units == {
        "EICU/INFUSION/norepinephrine": None,
        "EICU/INFUSION/norepinephrine//mcg/min": "ug/min",
        "EICU/INFUSION/norepinephrine//ml/hr": "mL/h",
        "EICU/INFUSION/insulin//units/hr": "[iU]/h",
    }
    assert found.tally.repaired["no-unit:infusionDrug"] == 1
    assert found.tally.repaired["no-rate:infusionDrug"] == 1


def treatment_table(folder: Path, active: str) -> None:
    (folder / "treatment.csv").write_text(
        "treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge\n"
        f"1,1,60,pulmonary|ventilation and oxygenation|mechanical ventilation,{active}\n"
    )


def test_nothing_depends_on_what_is_active_upon_discharge(source: Path) -> None:
    found = []
    for active in ("True", "False"):
        treatment_table(source, active)
        found.append(extract(source).items)
    assert found[0].events.equals(found[1].events)
    assert found[0].events["code"].to_list() == ["EICU/TREATMENT/mechanical_ventilation"]
    assert found[0].codes.row(0) == (
        "EICU/TREATMENT/mechanical_ventilation",
        "mechanical ventilation",
        None,
    )
    assert not any("activeupondischarge" in columns for columns in COLUMNS.values())


def test_diagnoses_are_no_events(source: Path) -> None:
    write(source, "diagnosis", [at("diagnosisoffset", 60, icd9code="038.9, A41.9")])
    assert extract(source).items.events.is_empty()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", "ondansetron"),
        ("1 ML  -  HYDROMORPHONE HCL 1 MG/ML IJ SOLN", "hydromorphone"),
        ("MORPHINE 5 MG/ML INJECTION : 1 ML VIAL", "morphine"),
        ("SODIUM CHLORIDE 0.9% 1,000 ML BAG", "sodium chloride"),
        ("3% Sodium Chloride", "sodium chloride"),
        ("potassium CHLORIDE 10 mEq i", "potassium chloride"),
        ("furosemide (LASIX) tablet 40 mg", "furosemide"),
        ("PIPERACILLIN/TAZOBACTAM SOD 3.375 GM  VIAL", "piperacillin/tazobactam sod"),
        ("ipratropium-albuterol", "ipratropium-albuterol"),
        ("NOREPINEPHRINE 8 MG in 250mL NS", "norepinephrine"),
        ("Volume (mL) Magnesium ", "magnesium"),
        ("1/2NS", "1/2ns"),
        ("IV", "iv"),  # nothing would be left
        ("0.9 %", "0.9 %"),
    ],
)
def test_drug_names(text: str, name: str) -> None:
    assert pl.select(drug_name(pl.lit(text))).item() == name


@given(st.text(st.characters(min_codepoint=32, max_codepoint=382), max_size=30).filter(str.strip))
def test_a_drug_always_has_a_name(text: str) -> None:
    name = pl.select(drug_name(pl.lit(text))).item()
    assert name
    assert name == name.lower().strip()


def test_every_laboratory_has_a_code_of_its_own() -> None:
    codes = lab_codes()
    assert codes["code"].is_unique().all()
    assert codes["labname"].is_unique().all()
    assert codes["descriptor"].null_count() == 0
    assert (codes["descriptor"] != "").all()


# ------------------------------------------------------------------------- tables and the benchmark


def test_absent_tables_are_reported(source: Path) -> None:
    found = extract(source)
    absent = {k for k in found.tally.refused if k.startswith("table-absent:")}
    assert absent == {f"table-absent:{t}" for t in COLUMNS if t not in ("patient", "vitalPeriodic")}
    assert found.observed("hr") == [(5, None, 80, 0)]
    assert found.items.events.is_empty()


@pytest.mark.parametrize(
    ("absent", "variables", "tasks"),
    [
        (("diagnosis", "physicalExam"), {"gcs_total"}, {"phenotyping"}),
        (("physicalExam", "lab"), {"gcs_total", "glucose", "ph"}, set()),
        (("respiratoryCharting",), set(), set()),
        (("respiratoryCharting", "lab"), {"fio2", "glucose", "ph"}, set()),
        (("vitalPeriodic",), {"hr", "rr", "spo2", "temp"}, set()),
        (("vitalAperiodic",), set(), set()),
    ],
)
def test_absent_tables_fail_no_gate(
    tmp_path: Path, absent: Sequence[str], variables: set[str], tasks: set[str]
) -> None:
    """The whole of `prepare` on three stays, one of which ended with death."""
    source = tmp_path / "source"
    source.mkdir()
    died = {"unitdischargestatus": "Expired", "hospitaldischargestatus": "Expired"}
    write(source, "patient", [patient(1, **died), patient(2), patient(3)])
    vitals = {"heartrate": 80, "respiration": 18, "sao2": 97, "temperature": 37}
    fio2 = {"respchartentryoffset": 60, "respchartvaluelabel": "FiO2", "respchartvalue": "40"}
    pressure = ("noninvasivesystolic", 120), ("noninvasivediastolic", 60), ("noninvasivemean", 80)
    arterial = ("systemicsystolic", 120), ("systemicdiastolic", 60), ("systemicmean", 80)
    tables: dict[str, Rows] = {
        "vitalPeriodic": [
            at("observationoffset", 60, s, **vitals, **dict(arterial)) for s in (1, 2)
        ],
        "vitalAperiodic": [at("observationoffset", 60, s, **dict(pressure)) for s in (1, 2)],
        "lab": [drawn(60, n, v) for n, v in (("glucose", 100), ("pH", 7.4), ("FiO2", 40))],
        "respiratoryCharting": [at("respchartoffset", 60, **fio2)],
        "physicalExam": [exam(60, "GCS", 14)],
        "diagnosis": [at("diagnosisoffset", 10, s, icd9code="038.9, A41.9") for s in (1, 2)],
    }
    for name, rows in tables.items():
        if name not in absent:
            write(source, name, rows)
    reader = EICU(source)
    assert reader.expected.absent_variables == variables
    assert {"mortality", "decompensation", "remaining_los", "phenotyping"} - tasks == (
        reader.expected.tasks
    )
    assert reader.info.label_notes.keys() == reader.expected.tasks
    info = prepare("eicu", source, tmp_path / "store", progress=False)
    assert {k for k in info.refused if k.split(":")[1] in absent} == {
        f"table-absent:{name}" for name in absent
    }


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("nurseCharting", "nursingchartoffset"),
        ("nurseCharting", "nursingchartentryoffset"),
        ("vitalPeriodic", "observationoffset"),
        ("vitalAperiodic", "observationoffset"),
        ("lab", "labresultoffset"),
        ("lab", "labname"),
        ("respiratoryCharting", "respchartoffset"),
        ("respiratoryCharting", "respchartentryoffset"),
        ("respiratoryCharting", "respchartvaluelabel"),
        ("physicalExam", "physicalexamoffset"),
        ("physicalExam", "physicalexampath"),
        ("medication", "drugorderoffset"),
        ("medication", "drugstartoffset"),
        ("medication", "drugordercancelled"),
        ("infusionDrug", "infusionoffset"),
        ("treatment", "treatmentoffset"),
        ("treatment", "treatmentstring"),
    ],
)
def test_a_row_without_a_key_is_damaged(source: Path, table: str, column: str) -> None:
    row = dict.fromkeys(COLUMNS[table], 1)
    write(source, table, [row, row | {column: ""}])
    with pytest.raises(SourceError, match=rf"{table}\.csv: line 3: column '{column}' is empty"):
        extract(source)


def test_a_pass_before_the_scans_has_a_bar(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of ingredients, and in `cohort`: the bars of the scans leave no room for another."""
    bars: list[Any] = []

    def shown(**kwargs: Any) -> Any:
        bars.append(progress_bar(disable=True))
        return bars[-1]

    monkeypatch.setattr("training.data.eicu.files.progress_bar", shown)
    write(source, "medication", [order(60, "Zofran", drughiclseqno=33598)])
    EICU(source).cohort(Tally())
    write(source, "lab", [drawn(60, "glucose", 100)])
    write(source, "nurseCharting", [charted(60, "Heart Rate", "Heart Rate", "88")])
    EICU(source, profile="benchmark").cohort(Tally())
    tasks = [task for bar in bars for task in bar.tasks]
    assert [task.description for task in tasks] == [
        "names of ingredients",
        "hours with nurse charting",
        "hours with results",
        "names of ingredients",
    ]
    assert all(task.completed == task.total > 0 for task in tasks)


def test_store(source: Path, tmp_path: Path) -> None:
    """The engine makes a store of it; two stays in one block, one without any observation."""
    write(source, "patient", [patient(1), patient(2)])
    write(source, "lab", [drawn(60, "creatinine", 1.2), drawn(60, "creatinine", 2, stay=2)])
    store, work = tmp_path / "store", tmp_path / "work"
    waterfall = build_store(EICU(source), store, work, progress=False)
    assert [s.stays for s in waterfall] == [2, 2, 2, 2, 2, 1]
    opened = EpisodeStore.open(store, verify=True)
    assert opened.info.options == {"profile": "strict"}
    assert opened.info.counts["observations"] == opened.info.counts["events"] == 1
    assert opened.info.refused["stay-without-observation:event"] == 1


def test_sources_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no patient\.csv"):
        EICU(tmp_path)
    write(tmp_path, "patient", [patient(1)])
    write(tmp_path, "lab", [])
    with pytest.raises(SourceError, match="no vital signs"):
        EICU(tmp_path)
    write(tmp_path, "vitalPeriodic", [])
    with pytest.raises(SourceError, match="no nurseCharting, which the benchmark"):
        EICU(tmp_path, profile="benchmark")
    with pytest.raises(SourceError, match="no profile 'loose'"):
        EICU(tmp_path, profile="loose")  # type: ignore[arg-type]


def test_benchmark(tmp_path: Path) -> None:
    changes = {"unitdischargestatus": "Expired", "hospitaldischargestatus": "Alive"}
    stays = [
        patient(1, **changes),
        patient(2, age="> 89"),
        patient(3, "twice"),
        patient(4, "twice"),
        patient(5),  # has no laboratory result
        patient(6),  # has data of 14 hours
        patient(7, "minor first", age="17"),
        patient(8, "minor first"),  # the only stay among those of the right age
    ]
    write(tmp_path, "patient", stays)
    # 14 rows in the hours 1 to 14 and two in what the benchmark takes for hour 0.
    hours = [charted(60 * h, "Heart Rate", "Heart Rate", "500") for h in range(1, 15)]
    zero = [charted(m, "O2 Saturation", "O2 Saturation", "97") for m in (-59, 59)]
    rows = [*hours, *zero, charted(900, "Heart Rate", "Heart Rate", "words")]
    later = [{**row, "patientunitstayid": s} for row in rows for s in (2, 3, 4, 5, 8)]
    short = [{**row, "patientunitstayid": 6} for row in [*hours[1:], *zero]]
    pressure = [
        charted(60, "BP", "Invasive BP Systolic", "121", entered=90),
        charted(60, "BP", "Non-Invasive BP Systolic", "118"),
        charted(60, "BP", "Non-Invasive BP Mean", "80"),
        charted(60, "Temperature", "Temperature (F)", "98.6"),
    ]
    write(tmp_path, "nurseCharting", [*rows, *later, *short, *pressure])
    labs = [drawn(60, "glucose", 100, labresultrevisedoffset=95), drawn(120, "glucose", 200)]
    gases = [drawn(60, "FiO2", 40), drawn(61, "FiO2", 0.5)]
    others = [drawn(0, "glucose", 100, stay=s) for s in (2, 3, 4, 6, 8)]
    write(tmp_path, "lab", [*labs, *gases, *others])
    write(tmp_path, "vitalPeriodic", [at("observationoffset", 5, heartrate=80)])
    write(tmp_path, "diagnosis", [at("diagnosisoffset", m, icd9code=c) for m, c in
          [(0, "428.0, I50.9"), (5, "038.9"), (6, "I50.9, 428.0")]])  # fmt: skip
    found = extract(tmp_path, profile="benchmark")
    assert found.cohort.stays["episode_id"].to_list() == ["1", "8"]
    assert [s.stays for s in found.cohort.waterfall] == [8, 6, 4, 3, 2]
    assert found.cohort.waterfall[-1].published_stays == 73_718
    assert found.stay(1)["mortality"] is False
    assert found.stay(1)["phenotypes"] == ["Septicemia (except in labor)"]
    assert found.stay(8)["phenotypes"] is None
    # Nurse charting and laboratory alone, at once, the largest of a minute, clipped. Glucose stays.
    assert found.observed("hr") == [(60 * h, None, 350, 0) for h in range(1, 15)]
    assert found.observed("sbp") == [(60, None, 121, 0)]
    assert found.observed("mbp") == []
    assert found.observed("temp") == [(60, None, 37, 0)]
    assert found.observed("glucose") == [(60, None, 100, 0), (120, None, 200, 0)]
    assert found.observed("fio2") == [(60, None, 0.4, 0), (61, None, 0.5, 0)]
    assert found.tally.repaired["clipped:hr"] == 28


# --------------------------------------------------------------------------------- the demo, golden


@pytest.fixture(scope="module")
def demo_source(llm4ehr_data: Path) -> Path:
    source = llm4ehr_data / "eicu-demo-2.0.1"
    if not source.is_dir():
        pytest.skip(f"{llm4ehr_data} has no eicu-demo-2.0.1")
    return source


@pytest.fixture(scope="module")
def demo(demo_source: Path) -> Extraction:
    return extract(demo_source)


def test_demo_cohort(demo: Extraction) -> None:
    assert [(s.stays, s.subjects) for s in demo.cohort.waterfall] == [
        (2012, 1461),
        (2007, 1457),
        (2007, 1457),
        (1963, 1451),
        (1528, 1304),
    ]
    stays = demo.cohort.stays
    assert stays["mortality"].sum() == 116
    assert stays["mortality"].null_count() == 22
    assert demo.tally.refused["table-absent:nurseCharting"] == 1
    assert demo.tally.refused["contradictory-outcome:mortality"] == 3


def test_demo_stays_by_hand(demo: Extraction) -> None:
    # 238463: patient.csv has 83 years, male, 180.3 cm, 103.9 kg, Expired in unit and hospital at
    # 1143; diagnosis.csv has no row of it.
    stay = demo.stay(238463)
    assert (stay["age_years"], stay["sex"], stay["unit_type"]) == (83, "male", "other")
    assert (stay["height_cm"], stay["weight_kg"]) == (180.3, 103.9)
    assert (stay["mortality"], stay["los_hours"], stay["n_hours"]) == (True, 1143 / 60, 20)
    assert stay["death_hours_low"] == 1143 / 60
    assert stay["phenotypes"] is None
    # 151179: Alive in the unit at 4904, Expired in the hospital at 9272; without a weight.
    # diagnosis.csv has 18 rows, among them 276.2 (fluid) and 785.52 (shock).
    stay = demo.stay(151179)
    assert (stay["mortality"], stay["death_hours_low"]) == (True, 9272 / 60)
    assert (stay["los_hours"], stay["weight_kg"]) == (4904 / 60, None)
    assert stay["phenotypes"] == ["Fluid and electrolyte disorders", "Shock"]
    # 325924: diagnosis.csv has 584.9, 482.2 and shock; CCU-CTICU is none of the types.
    stay = demo.stay(325924)
    assert stay["phenotypes"] == [
        "Acute and unspecified renal failure",
        "Pneumonia (except that caused by tuberculosis or sexually transmitted disease)",
        "Shock",
    ]
    # 176730: Expired in the unit, Alive in the hospital. 186393: "> 89" years, unit stay of 5824.
    assert demo.stay(176730)["mortality"] is None
    assert demo.stay(186393)["age_years"] == 90
    assert demo.stay(186393)["end_hours"] == 5824 / 60


def test_demo_values_by_hand(demo: Extraction) -> None:
    # 238463, vitalPeriodic.csv: vitalperiodicid 4725 at 0 and 4726 at 60.
    assert demo.observed("hr", 238463)[:2] == [(0, None, 128, 0), (60, None, 110, 0)]
    assert demo.observed("temp", 238463)[:2] == [(0, None, 37.2, 0), (60, None, 37.2, 0)]
    assert demo.observed("rr", 238463)[:2] == [(0, None, 17, 0), (60, None, 33.5, 0)]
    sbp = demo.observed("sbp", 238463)
    assert sbp[0] == (0, None, 84, 0)
    # vitalAperiodic.csv: vitalaperiodicid 699032 has 123/68 (90) at 288.
    assert (288, None, 123, 1) in sbp
    assert (288, None, 68, 1) in demo.observed("dbp", 238463)
    assert (288, None, 90, 1) in demo.observed("mbp", 238463)
    # physicalExam.csv: physicalexamid 5278384 to 5278386 at 19 and 6642047 to 6642049 at 54 are 1.
    assert demo.observed("gcs_total", 238463) == [(19, None, 3, 0), (54, None, 3, 0)]
    # 2895549: 100203687 to 100203689 at 73 are motor 4, eyes 2, verbal 3.
    assert (73, None, 9, 0) in demo.observed("gcs_total", 2895549)
    # respiratoryCharting.csv: respchartid 904114 has FiO2 50 at 1014.
    assert (1014, None, 0.5, 0) in demo.observed("fio2", 238463)
    # lab.csv: labid 5046 glucose 66 at 0, 5054 glucose 166 at 60, 5050 calcium 8.1 at 60.
    assert demo.observed("glucose", 238463)[:2] == [(0, None, 66, 0), (60, None, 166, 0)]
    assert demo.happened("LOINC/17861-6", 238463)[0] == (60, None, 8.1)


def test_demo_events_by_hand(demo: Extraction) -> None:
    # 238463, medication.csv: 10792646 is ordered at 825, starts at 963 and stops at 1116; 8146728
    # is ordered at 280, starts at 663 and stops at 563, which is no stop.
    assert demo.happened("EICU/ORDER/clopidogrel_bisulfate", 238463) == [
        (663, None, None),
        (963, None, None),
    ]
    assert demo.happened("EICU/ORDER_END/clopidogrel_bisulfate", 238463) == [(1116, None, None)]
    # 325924: medicationid 16828893 has no name but hicl 36875, which named orders of it, such as
    # 7278288, call hydrocortisone; it starts at 5123. 15484502 has it too, at 5303.
    orders = demo.happened("EICU/ORDER/hydrocortisone_na_succinate", 325924)
    assert {(5123, None, None), (5303, None, None)} <= set(orders)
    # 325924, treatment.csv: treatmentid 10599338 and 13352092 at 3202.
    assert (3202, None, None) in demo.happened("EICU/TREATMENT/insertion", 325924)
    assert (3202, None, None) in demo.happened("EICU/TREATMENT/mechanical_ventilation", 325924)
    # 1805312, infusiondrug.csv: 44426200 is Amiodarone (mg/min) 0.5 at 5043, 42428161 is MIV
    # (ml/hr) 50 at 7752.
    assert (5043, None, 0.5) in demo.happened("EICU/INFUSION/amiodarone//mg/min", 1805312)
    assert (7752, None, 50) in demo.happened("EICU/INFUSION/miv//ml/hr", 1805312)


def test_demo_agrees_with_sql(demo: Extraction, demo_source: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    db = duckdb.connect()
    db.execute(f"set threads=1; set file_search_path='{demo_source}'")
    db.execute(
        """
        create table cohort as
        with adults as (
            select *, case age when '> 89' then 90 else try_cast(age as int) end as years
            from read_csv('patient.csv.gz', all_varchar=true)
        ), long as (
            select * from adults
            where years >= 18 and cast(unitdischargeoffset as int) >= 60
        )
        select cast(patientunitstayid as int) as id, cast(unitdischargeoffset as int) as stop
        from long where patienthealthsystemstayid in (
            select patienthealthsystemstayid from long group by 1 having count(*) = 1
        )
        """
    )
    ids = [str(i) for (i,) in db.execute("select id from cohort").fetchall()]
    assert sorted(ids) == demo.cohort.stays["episode_id"].to_list()

    def kept(table: str, column: str, low: float, high: float) -> int:
        """Distinct values of a stay and minute that are possible and not zero."""
        query = f"""
            select count(*) from (
                select distinct id, observationoffset, {column}
                from read_csv('{table}.csv.gz') t join cohort c on t.patientunitstayid = c.id
                where observationoffset between 0 and stop
                  and {column} between {low} and {high} and {column} <> 0
            )
        """
        return db.execute(query).fetchone()[0]

    limits = {"hr": (0, 350), "rr": (0, 300), "sbp": (0, 375), "dbp": (0, 375), "mbp": (14, 330)}
    columns = {
        ("hr", 0): ("vitalPeriodic", "heartrate"),
        ("rr", 0): ("vitalPeriodic", "respiration"),
        ("sbp", 0): ("vitalPeriodic", "systemicsystolic"),
        ("dbp", 0): ("vitalPeriodic", "systemicdiastolic"),
        ("mbp", 0): ("vitalPeriodic", "systemicmean"),
        ("sbp", 1): ("vitalAperiodic", "noninvasivesystolic"),
        ("dbp", 1): ("vitalAperiodic", "noninvasivediastolic"),
        ("mbp", 1): ("vitalAperiodic", "noninvasivemean"),
    }
    counted = demo.items.observations.group_by("variable", "priority").len()
    ours = {(variable, priority): n for variable, priority, n in counted.iter_rows()}
    assert {key: ours[key] for key in columns} == {
        key: kept(*of, *limits[key[0]]) for key, of in columns.items()
    }
    scored = db.execute(
        """
        select count(*) from (
            select distinct id, physicalexamoffset
            from read_csv('physicalExam.csv.gz', all_varchar=true) e
            join cohort c on cast(e.patientunitstayid as int) = c.id
            where cast(physicalexamoffset as int) between 0 and stop
              and regexp_matches(physicalexampath, '/GCS/((Eyes|Verbal|Motor) Score/)?[0-9]+$')
        )
        """
    ).fetchone()[0]
    coma = demo.items.observations.filter(pl.col("variable") == "gcs_total")
    assert coma.select("stay", "hours").n_unique() == scored


def test_demo_raw_laboratory(demo_source: Path, tmp_path: Path) -> None:
    """`partial/lab.csv.gz` is the official table of 132 stays, with entry times and units."""
    for file in ("patient.csv.gz", "vitalPeriodic.csv.gz", "partial/lab.csv.gz"):
        (tmp_path / Path(file).name).symlink_to(demo_source / file)
    found = extract(tmp_path)
    # 1063405: labid 253530212 is glucose 156 at 11970, entered 11991; 251738171 is 170, entered
    # 12094.
    glucose = [g for g in found.observed("glucose", 1063405) if g[0] == 11970]
    assert glucose == [(11970, 11991, 156, 0), (11970, 12094, 170, 0)]
    # 255054032 is Hgb 8.3 at 11825, entered 11833; 254454925 is 8.0, entered 11868.
    assert (11825, 11868, 8.0) in found.happened("LOINC/718-7", 1063405)
    # 2580992: 618772484 is FiO2 10000 (text 100.0) at 114, entered 122.
    assert (114, 122, 1, 0) in found.observed("fio2", 2580992)
    # 1073098: 253567885 is ionized calcium 5.0 (text 1.25, mmol/L) at 107, entered 120.
    assert (107, 120, round(5 / 4.0078, 6)) in found.happened("LOINC/1994-3", 1073098)
    # 210641: 44160963 is troponin I "<0.02" at 192, entered 259.
    assert (192, 259, 0.02) in found.happened("LOINC/10839-9", 210641)
    # 395323: 82515825 is magnesium 1.4 meq/L at 5258, entered 5276.
    assert (5258, 5276, 1.70142) in found.happened("LOINC/19123-9", 395323)
    # Every laboratory of the sample is known, in its usual unit.
    assert not found.items.codes["code"].str.contains("//").any()
    calcium = found.items.events.filter(pl.col("code") == "LOINC/1994-3")["value"]
    assert calcium.is_between(0.7, 1.6).all()
    oxygen = found.items.observations.filter(pl.col("variable") == "fio2")["value"]
    assert oxygen.is_between(0.21, 1).all()
