"""The MIMIC-IV reader, on a tiny synthetic set."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.training.data.mimic4_source import (
    Extract,
    Extraction,
    Rows,
    a_patient,
    charted,
    drawn,
    order,
    write,
)
from training.data.extraction import Step
from training.data.mimic.mimic4 import Mimic4
from training.data.sources import SourceError, Tally


@pytest.fixture
def extract(tmp_path: Path) -> Extract:
    """`extract(*parts)`: extraction of a set made up of patients and rows."""

    def run(*parts: Rows, without: tuple[str, ...] = (), **options: float) -> Extraction:
        source = write(tmp_path / "mimic-iv", *parts, without=without)
        return Extraction(source, tmp_path, **options)

    return run


# The made-up set: the cohort.


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, a_patient(1), without=("icu/inputevents",))
    with pytest.raises(SourceError, match=r"inputevents\.csv"):
        Mimic4(source)


def test_cohort_rules(extract: Extract) -> None:
    twice = a_patient(4)
    second = {"stay_id": 2004, "intime": "2180-05-05 10:00:00", "outtime": "2180-05-06 10:00:00"}
    twice["icu/icustays"] = [*twice["icu/icustays"], twice["icu/icustays"][0] | second]
    # The second stay of this admission falls to an earlier rule, so the first one is alone.
    moved = a_patient(5)
    moved["icu/icustays"] = [
        *moved["icu/icustays"],
        moved["icu/icustays"][0] | second | {"stay_id": 2005, "last_careunit": "Neuro Stepdown"},
    ]
    orphan = a_patient(9)
    orphan["hosp/admissions"] = []
    unseen = a_patient(10)
    unseen["icu/chartevents"] = []
    made = extract(
        a_patient(1),
        a_patient(2, last_careunit="Neuro Stepdown"),
        a_patient(3, anchor_age=15),
        twice,
        moved,
        a_patient(6, deathtime="2180-05-01 09:00:00", hospital_expire_flag=1),
        a_patient(7, outtime="2180-05-01 09:59:00"),
        a_patient(8, anchor_age=16),
        orphan,
        unseen,
    )
    assert made.waterfall == (
        Step("all ICU stays", 12, 10),
        Step("first and last care unit are the same", 10, 9),
        Step("admission and patient are known", 9, 8),
        Step("the only such ICU stay of its admission", 7, 7),
        Step("18 years or older", 6, 6),
        Step("alive at ICU admission", 5, 5),
        Step("ends after it starts", 4, 4),
        Step("with at least one observation", 3, 3),
    )
    assert made.episodes["episode_id"].to_list() == ["1001", "1005", "1008"]


def test_facts_of_a_stay(extract: Extract) -> None:
    made = extract(
        a_patient(1),
        a_patient(
            2, gender="M", anchor_age=91, first_careunit="Coronary Care Unit (CCU)",
            last_careunit="Coronary Care Unit (CCU)", outtime="2180-05-01 12:30:00",
        ),
    )  # fmt: skip
    first, second = made.episode(1001), made.episode(1002)
    assert first["age_years"] == 62  # 60 in the anchor year 2178
    assert second["age_years"] == 90
    assert (first["sex"], second["sex"]) == ("female", "male")
    assert (first["unit_type"], second["unit_type"]) == ("medical", "coronary")
    assert (first["n_hours"], second["n_hours"]) == (48, 3)
    assert (first["los_hours"], second["los_hours"]) == (48.0, 2.5)
    assert first["phenotypes"] is None  # not coded
    assert first["height_cm"] is first["weight_kg"] is first["benchmark_split"] is None


def test_deaths(extract: Extract) -> None:
    made = extract(
        a_patient(1, hospital_expire_flag=1, deathtime="2180-05-02 10:00:00"),
        a_patient(2, hospital_expire_flag=1, deathtime="2180-05-09 10:00:00"),  # on the ward
        a_patient(3, hospital_expire_flag=1, dod="2180-05-02"),  # the day alone is known
        a_patient(4, hospital_expire_flag=1),  # nothing is known
        a_patient(5, dod="2180-05-04"),  # after discharge
        a_patient(6, deathtime="2180-05-02 10:00:00"),  # the flag is wrong
    )

    def outcome(stay: int) -> tuple[object, ...]:
        of = made.episode(stay)
        return of["mortality"], of["los_hours"], of["death_hours_low"]

    assert outcome(1001) == (True, 24.0, 24.0)
    high = made.episode(1001)["death_hours_high"]
    assert isinstance(high, float)
    assert 24 < high < 24 + 1e-9
    assert outcome(1002) == (True, 48.0, 192.0)
    assert outcome(1003) == (True, 48.0, 14.0)
    assert made.episode(1003)["death_hours_high"] == 38.0
    assert outcome(1004) == (True, 48.0, None)
    assert outcome(1005) == (False, 48.0, None)
    assert outcome(1006) == (True, 24.0, 24.0)


def test_inconsistent_deaths_are_counted(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        a_patient(1, hospital_expire_flag=1, dod="2180-05-02"),
        a_patient(2, deathtime="2180-05-02 10:00:00"),
        a_patient(3, deathtime="soon"),
    )
    tally = Tally()
    Mimic4(source).cohort(tally)
    assert tally.repaired == {
        "death-without-time:admissions": 1,
        "death-without-flag:admissions": 1,
    }
    assert tally.refused == {"unreadable-time:admissions": 1}


@pytest.mark.parametrize(
    ("dod", "low", "unreadable"),
    [("2180-05-02", 14.0, 0), ("2180-05-02 00:00:00", 14.0, 0), ("5/2/2180", None, 1)],
)
def test_the_day_of_death(tmp_path: Path, dod: str, low: float | None, unreadable: int) -> None:
    died = {"hospital_expire_flag": 1}
    others = [a_patient(n, dod="2181-01-01", **died) for n in (2, 3)]
    source, tally = write(tmp_path, a_patient(1, dod=dod, **died), *others), Tally()
    stays = Mimic4(source).cohort(tally).stays
    assert stays["death_hours_low"][0] == low
    assert tally.refused["unreadable-time:patients"] == unreadable


def test_times_in_another_form_are_named(tmp_path: Path) -> None:
    source = write(tmp_path, a_patient(1, intime="05/01/2180 10:00"))
    with pytest.raises(SourceError, match=r"icustays\.csv\.gz: column 'intime': 1 of 1 are not"):
        Mimic4(source).cohort(Tally())


def test_phenotypes_of_both_versions(extract: Extract) -> None:
    codes = [(1, "4019", 9), (1, "I5033", 10), (2, "V1234", 9)]
    diagnoses = [{"hadm_id": 100 + n, "icd_code": c, "icd_version": v} for n, c, v in codes]
    made = extract(a_patient(1), a_patient(2), {"hosp/diagnoses_icd": diagnoses})
    assert made.episode(1001)["phenotypes"] == [
        "Congestive heart failure; nonhypertensive",
        "Essential hypertension",
    ]
    assert made.episode(1002)["phenotypes"] == []
    assert not made.events["code"].str.contains("(?i)icd|diagnos").any()


LABORATORY = {
    "hosp/d_labitems": [
        {"itemid": 50820, "label": "pH", "fluid": "Blood", "category": "Blood Gas"},
        {"itemid": 52033, "label": "Specimen Type", "fluid": "Blood", "category": "Blood Gas"},
        {"itemid": 50912, "label": "Creatinine", "fluid": "Blood", "category": "Chemistry"},
        {"itemid": 50931, "label": "Glucose", "fluid": "Blood", "category": "Chemistry"},
        {"itemid": 51491, "label": "pH", "fluid": "Urine", "category": "Hematology"},
        {"itemid": 51478, "label": "Glucose", "fluid": "Urine", "category": "Hematology"},
    ]
}


def test_charted_values(extract: Extract) -> None:
    made = extract(
        a_patient(1),
        charted("11:30", 220045, "", valuenum=90),  # the number alone
        charted("12:00", 220179, 120),
        charted("12:00", 220050, 130),
        charted("12:00", 223761, 98.6),
        charted("12:30", 223762, 38.5),
        charted("12:00", 223835, 40),
        charted("12:00", 220277, 97, storetime="2180-05-01 12:45:00"),
        charted("13:00", 220277, 96, storetime="2180-05-01 12:00:00"),  # stored before it was true
        charted("12:00", 220739, "None"),
        charted("12:00", 223900, "No Response-ETT", valuenum=1),
        charted("12:00", 223901, "Obeys Commands", valuenum=6),
        charted("09:00", 220045, 70),  # before admission
        charted("12:00", 220734, 6),  # a dipstick: pH of urine
        charted("12:00", 226512, 70),  # an item that is no variable
        charted("12:00", 220045, 100, stay_id=77),  # a stay that is not in the cohort
    )
    assert made.observed(1001, "hr") == [(1.0, None, 80, 0), (1.5, None, 90, 0)]
    assert made.observed(1001, "sbp") == [(2.0, None, 130, 0), (2.0, None, 120, 1)]
    assert made.observed(1001, "temp") == [(2.0, None, 37.0, 0), (2.5, None, 38.5, 0)]
    assert made.observed(1001, "fio2") == [(2.0, None, 0.4, 0)]
    assert made.observed(1001, "spo2") == [(2.0, 2.75, 97, 0), (3.0, 3.0, 96, 0)]
    assert made.observed(1001, "gcs_total") == [(2.0, None, 1 + 1 + 6, 0)]
    assert made.observed(1001, "ph") == []


def test_laboratory(extract: Extract) -> None:
    made = extract(
        a_patient(1),
        LABORATORY,
        drawn("12:00", 50912, 1.4, valueuom="mg/dL", hadm_id=""),  # by its time, not its admission
        drawn("13:00", 50912, "<0.2", storetime="2180-05-01 13:20:00", valueuom="mg/dL"),
        drawn("14:00", 50912, "___", valueuom="mg/dL"),
        drawn("08:00", 50912, 9.9, valueuom="mg/dL"),  # before the stay
        drawn("12:00", 50820, 7.31),
        drawn("12:00", 52033, "ART."),
        drawn("15:00", 50820, 7.25),
        drawn("12:00", 50931, 150),
        drawn("12:00", 51491, 5.5),  # urine
        drawn("12:00", 51478, 300),
        charted("12:05", 220621, 150),  # copies of the laboratory
        charted("13:00", 223830, 7.31),
        charted("12:05", 225664, 150),  # a finger stick is a measurement of its own
        drawn("09:30", 50931, 210),  # before the stay, but charted within it
        charted("10:30", 220621, 210),
    )
    creatinine = [(2.0, 4.0, 1.4), (3.0, 3.3333, 0.2)]
    assert made.happened(1001, "LOINC/2160-0") == creatinine
    assert made.observed(1001, "ph") == [(2.0, 2.5, 7.31, 0), (5.0, 5.5, 7.25, 1)]
    glucose = [(0.5, None, 210, 0), (2.0, 4.0, 150, 0), (2.0833, None, 150, 1)]
    assert made.observed(1001, "glucose") == glucose
    assert made.happened(1001, "MIMIC/LAB/51478") == [(2.0, 4.0, 300)]


def test_a_copy_of_a_result_that_is_no_observation_stays(extract: Extract) -> None:
    drawn_before_end = {"charttime": "2180-05-03 09:00:00"}  # known an hour after the end
    made = extract(
        a_patient(1),
        LABORATORY,
        drawn("12:00", 50931, 140, **drawn_before_end),
        charted("12:00", 220621, 140, charttime="2180-05-03 09:30:00"),
    )
    assert made.observed(1001, "glucose") == [(47.5, None, 140, 0)]


@pytest.mark.parametrize("delay", [-1.0, float("nan")])
def test_no_result_is_known_before_its_sample(tmp_path: Path, delay: float) -> None:
    with pytest.raises(SourceError, match="lab_delay"):
        Mimic4(write(tmp_path, a_patient(1)), lab_delay=delay)


def test_lab_delay_is_an_option(extract: Extract) -> None:
    labs = (drawn("12:00", 50912, 1.4), drawn("13:00", 50912, 1.5, storetime="2180-05-01 13:30:00"))
    made = extract(a_patient(1), LABORATORY, *labs, lab_delay=6.0)
    assert made.happened(1001, "LOINC/2160-0") == [(2.0, 8.0, 1.4), (3.0, 3.5, 1.5)]


INTERVALS = (
    order("inputevents", "12:00", "13:00", 221906, rate=0.1, rateuom="mcg/kg/min", amount=5),
    order("inputevents", "13:00", "14:00", 221906, rate=0.2, rateuom="mcg/kg/min", amount=5),
    order("inputevents", "15:00", "15:01", 221668, amount=2),
    order("inputevents", "16:00", "17:00", 221906, rate=9, statusdescription="Rewritten"),
    order("procedureevents", "12:30", "18:00", 225792, value=330),
    order("procedureevents", "12:30", "18:00", 999999, stay_id=77),
)


DICTIONARY = {
    "icu/d_items": [
        {"itemid": 221906, "label": "Norepinephrine"},
        {"itemid": 225792, "label": "Invasive Ventilation"},
    ]
}


def test_infusions_and_procedures(extract: Extract) -> None:
    made = extract(a_patient(1), DICTIONARY, *INTERVALS)
    start, end = "MIMIC/INPUT_START/221906", "MIMIC/INPUT_END/221906"
    assert made.happened(1001, start) == [(2.0, None, 0.1), (3.0, None, 0.2)]
    assert made.happened(1001, end) == [(4.0, None, None)]  # a new rate is no end
    assert made.happened(1001, "MIMIC/INPUT_START/221668") == [(5.0, None, None)]
    assert made.happened(1001, "MIMIC/INPUT_END/221668") == []  # given at once
    assert made.happened(1001, "MIMIC/PROCEDURE_START/225792") == [(2.5, None, None)]
    assert made.happened(1001, "MIMIC/PROCEDURE_END/225792") == [(8.0, None, None)]
    assert len(made.events) == 6
    assert dict(made.codes.select("code", "descriptor").rows())[start] == "norepinephrine started"


def test_without_the_dictionary_of_items(extract: Extract) -> None:
    made = extract(a_patient(1), *INTERVALS, without=("icu/d_items",))
    named = dict(made.codes.select("code", "descriptor").rows())
    assert named["MIMIC/PROCEDURE_START/225792"] == "invasive ventilation started"
    assert named["MIMIC/INPUT_END/221906"] == "norepinephrine ended"


def test_nothing_after_death(extract: Extract) -> None:
    dead = a_patient(1, hospital_expire_flag=1, deathtime="2180-05-01 12:00:00")
    made = extract(dead, charted("12:00", 220045, 0), charted("12:01", 220045, 50), DICTIONARY,
                   *INTERVALS)  # fmt: skip
    assert made.observed(1001, "hr") == [(1.0, None, 80, 0)]
    assert made.events["hours"].to_list() == [2.0]  # the infusion that began at that minute


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *(("icu/chartevents", c) for c in ("stay_id", "itemid", "charttime")),
        *(("hosp/labevents", c) for c in ("subject_id", "itemid", "charttime")),
        *(
            (f"icu/{table}", c)
            for table in ("inputevents", "procedureevents")
            for c in ("stay_id", "itemid", "starttime", "endtime")
        ),
        ("icu/procedureevents", "statusdescription"),
    ],
)
def test_a_row_without_a_key_is_damaged(tmp_path: Path, name: str, column: str) -> None:
    rows = charted("12:00", 220045, 70) | drawn("12:00", 50912, 1.4) | INTERVALS[0] | INTERVALS[4]
    source = write(tmp_path, a_patient(1), rows, {name: [rows[name][0] | {column: ""}]})
    reader = Mimic4(source)
    tables = [scan.table for scan in reader.scans(reader.cohort(Tally()))]
    with pytest.raises(SourceError, match=rf"line \d: column '{column}' is empty"):
        _ = [list(table.chunks()) for table in tables]


def test_rows_without_a_time_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path, a_patient(1), charted("12:00", 220045, 70))
    reader, tally = Mimic4(source), Tally()
    scan = reader.scans(reader.cohort(tally))[0]
    (chunk,) = scan.table.chunks()
    kept = scan.select(chunk.frame.with_columns(charttime=pl.lit(None, pl.String)), tally)
    assert kept.is_empty()
    assert tally.refused == {"untimed:chartevents": 2}


def test_unreadable_times_are_counted(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        a_patient(1),
        charted("99:00", 220045, 70),
        drawn("99:00", 50912, 1.4),
        order("inputevents", "99:00", "13:00", 221906),
    )
    reader, tally = Mimic4(source), Tally()
    for scan in reader.scans(reader.cohort(tally)):
        for chunk in scan.table.chunks():
            scan.select(chunk.frame, tally)
    assert tally.refused == {
        "unreadable-time:chartevents": 1,
        "unreadable-time:labevents": 1,
        "unreadable-time:inputevents": 1,
    }
