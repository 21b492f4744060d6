"""The eICU reader: the 11 variables, on a tiny synthetic set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data.eicu_source import (
    at,
    charted,
    drawn,
    exam,
    extract,
    one_stay,
    patient,
    write,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_stay(tmp_path)


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
