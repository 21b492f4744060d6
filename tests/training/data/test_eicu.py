"""The eICU reader: cohort, labels, absent tables and the benchmark, on a tiny synthetic set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm4ehr.store import EpisodeStore
from tests.training.data.eicu_source import (
    Rows,
    at,
    charted,
    drawn,
    exam,
    extract,
    one_stay,
    order,
    patient,
    write,
)
from training.data.build import build_store
from training.data.eicu.files import COLUMNS
from training.data.eicu.reader import EICU
from training.data.prepare import prepare
from training.data.sources import SourceError, Tally
from training.progress import progress_bar


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_stay(tmp_path)


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
