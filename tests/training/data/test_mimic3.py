"""The MIMIC-III reader: cohort, rows of a stay, charts and quirks, on a tiny synthetic set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.mimic3_source import (
    ADMITTED,
    admission,
    at_hour,
    chart,
    extract,
    lab,
    order,
    write,
)
from training.data.mimic.mimic3 import Mimic3
from training.data.sources import SourceError, Tally

Source = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """`source(TABLE=[rows], ...)`: a folder in the official format; one stay unless told."""
    return lambda **tables: write(tmp_path, **tables)


# --- the cohort -----------------------------------------------------------------------------------


def with_patients(source: Source, *patients: dict[str, dict[str, Any]], **tables: Any) -> Path:
    return source(**{t: [p[t] for p in patients] for t in ADMITTED}, **tables)


def test_cohort_keeps_adults_with_one_stay_without_transfer(source: Source) -> None:
    child, old = {"dob": "2140-01-01 00:00:00"}, {"dob": "1850-01-01 00:00:00"}
    stays = [admission(n)["ICUSTAYS"] for n in (1, 3, 4, 5, 6)]
    stays += [admission(2, last_careunit="SICU")["ICUSTAYS"]]
    stays += [admission(1)["ICUSTAYS"] | {"hadm_id": 11, "icustay_id": 101}]
    stays += [admission(3)["ICUSTAYS"] | {"icustay_id": 301}]
    stays += [admission(5, last_wardid=6)["ICUSTAYS"] | {"icustay_id": 501}]
    made = extract(
        source(
            ICUSTAYS=stays,
            ADMISSIONS=[
                *(admission(n)["ADMISSIONS"] for n in range(1, 7)),
                admission(1)["ADMISSIONS"] | {"hadm_id": 11},
            ],
            PATIENTS=[
                *(admission(n)["PATIENTS"] for n in (1, 2, 3, 5)),
                admission(4, **child)["PATIENTS"],
                admission(6, **old)["PATIENTS"],
            ],
        )
    )
    # The moved stay of patient 5 goes first, so the other one is the only one of its admission.
    assert made.cohort.stays["episode_id"].to_list() == ["100", "101", "500", "600"]
    assert [step.stays for step in made.cohort.waterfall] == [9, 7, 7, 5, 4, 4, 4]
    assert [step.subjects for step in made.cohort.waterfall] == [6, 5, 5, 4, 3, 3, 3]
    assert made.stay(600)["age_years"] == 90
    # from 2090-01-01 to 2150-01-01 are 21,914 days
    assert made.stay(100)["age_years"] == pytest.approx(21914 / 365)


@pytest.mark.parametrize("profile", ["strict", "benchmark"])
def test_stay_without_an_end_is_left_out(source: Source, profile: str) -> None:
    folder = with_patients(source, admission(1), admission(2, outtime="", los=""))
    made = extract(folder, profile=profile)
    assert made.cohort.stays["episode_id"].to_list() == ["100"]
    assert made.cohort.waterfall[-1].stays == 1


def test_stay_after_death_is_left_out(source: Source) -> None:
    made = extract(
        with_patients(
            source,
            admission(1),
            admission(2, deathtime="2149-12-31 22:00:00"),  # an hour before admission to the ICU
            admission(3, dod="2149-12-20 00:00:00"),
            admission(4, outtime="2149-12-31 23:00:00"),
            admission(5, dod="2150-01-01 00:00:00"),  # some time on the day of ICU admission
        )
    )
    assert made.cohort.stays["episode_id"].to_list() == ["100", "500"]
    assert [s.stays for s in made.cohort.waterfall[-2:]] == [3, 2]


@pytest.mark.parametrize(
    ("changes", "strict", "benchmark"),
    [
        # (died, death from, death before, end), hours; discharge is on 2150-01-05 at 12:00
        ({}, (False, None, None, 48), (False, None, None, 48)),
        # The stay of a patient who died before OUTTIME ends with the death.
        ({"deathtime": "2150-01-02 12:00:00"}, (True, 36, 36, 36), (True, 36, 36, 48)),
        # A death in the ward, after the ICU.
        ({"deathtime": "2150-01-04 00:00:00"}, (True, 72, 72, 48), (True, 72, 72, 48)),
        # DEATHTIME after DISCHTIME: the benchmark takes it for a death after discharge.
        ({"deathtime": "2150-01-05 13:00:00"}, (True, 109, 109, 48), (False, None, None, 48)),
        # Only the day is known: it is after 00:00 on 2150-01-03.
        ({"dod": "2150-01-03 00:00:00"}, (True, 48, 72, 48), (True, None, None, 48)),
        # The day of hospital admission: its midnight lies before the admission at 20:00.
        ({"dod": "2149-12-31 00:00:00", "intime": "2149-12-31 21:00:00"},
         (True, -21, 3, 51), (False, None, None, 48)),
        ({"dod": "2150-01-06 00:00:00"}, (False, None, None, 48), (False, None, None, 48)),
    ],
)  # fmt: skip
def test_death_in_hospital(
    source: Source, changes: dict[str, str], strict: tuple, benchmark: tuple
) -> None:
    folder = with_patients(source, admission(1, **changes))
    for profile, expected in (("strict", strict), ("benchmark", benchmark)):
        stay = extract(folder, profile=profile).stay(100)
        died, low, high, end = expected
        assert (stay["mortality"], stay["end_hours"]) == (died, end), profile
        assert stay["death_hours_low"] == low, profile
        assert stay["death_hours_high"] == pytest.approx(high), profile
        assert low is None or stay["death_hours_high"] > low
        assert stay["los_hours"] == stay["end_hours"]
        assert stay["n_hours"] == end


def test_static_facts_and_published_split(source: Source) -> None:
    # Of the published lists: 4 test, 9 validation, 3 training.
    people = [
        admission(4, gender="M", first_careunit="CCU", last_careunit="CCU"),
        admission(9, first_careunit="CSRU", last_careunit="CSRU"),
        admission(3, first_careunit="TSICU", last_careunit="TSICU"),
    ]
    made = extract(with_patients(source, *people)).cohort.stays
    assert made.select(
        "episode_id", "subject_id", "benchmark_split", "sex", "unit_type"
    ).rows() == [
        ("300", "3", "train", "female", "surgical"),
        ("400", "4", "test", "male", "coronary"),
        ("900", "9", "val", "female", "cardiac_surgery"),
    ]


def test_phenotypes_of_the_benchmark_need_a_dictionary_entry(source: Source) -> None:
    ids = {"subject_id": 1, "hadm_id": 10}
    folder = with_patients(
        source,
        admission(1),
        admission(2),
        DIAGNOSES_ICD=[{**ids, "icd9_code": "99591"}, {**ids, "icd9_code": "4280"}],
        D_ICD_DIAGNOSES=[{"icd9_code": "99591"}],
    )
    sepsis, failure = "Septicemia (except in labor)", "Congestive heart failure; nonhypertensive"
    assert extract(folder).stay(100)["phenotypes"] == [failure, sepsis]
    assert extract(folder).stay(200)["phenotypes"] is None
    assert extract(folder, profile="benchmark").stay(100)["phenotypes"] == [sepsis]


def test_dates_need_no_time_of_day(source: Source) -> None:
    changes = {"dob": "2090-01-01", "dod": "2150-01-03"}
    made = extract(with_patients(source, admission(1, **changes), admission(2, dob="1850-01-01")))
    assert made.stay(100)["age_years"] == pytest.approx(21914 / 365)
    assert (made.stay(100)["death_hours_low"], made.stay(100)["death_hours_high"]) == (48, 72)
    assert made.stay(200)["age_years"] == 90
    assert made.tally.refused == {}


def test_dates_that_cannot_be_read_are_counted_or_named(source: Source) -> None:
    folder = with_patients(source, admission(1), admission(2), admission(3, dob="1/1/2090"))
    made = extract(folder)
    assert made.cohort.stays["episode_id"].to_list() == ["100", "200"]
    assert made.tally.refused == {"unreadable-time:PATIENTS": 1}
    folder = with_patients(source, *(admission(n, dob="1/1/2090") for n in (1, 2)))
    with pytest.raises(SourceError, match=r"PATIENTS\.csv: column 'dob': 2 of 2 .* YYYY-MM-DD$"):
        extract(folder)
    folder = with_patients(source, admission(1, intime="2150-01-01"))
    with pytest.raises(SourceError, match=r"ICUSTAYS\.csv: column 'intime': 1 of 1 .* hh:mm:ss$"):
        extract(folder)


# --- which rows belong to a stay ------------------------------------------------------------------


def test_rows_are_validated_in_the_published_order(source: Source) -> None:
    heart_rate = chart(211, 80)
    made = extract(
        source(
            CHARTEVENTS=[
                heart_rate,
                heart_rate | {"icustay_id": "", "charttime": at_hour(2)},
                heart_rate | {"hadm_id": "", "icustay_id": ""},
                heart_rate | {"hadm_id": 11},
                heart_rate | {"icustay_id": 101},
                heart_rate | {"subject_id": 2, "hadm_id": 20},  # not a patient of the cohort
                heart_rate | {"itemid": 212, "hadm_id": ""},  # an item that is not read
                heart_rate | {"charttime": "2150-01-01 25:00:00"},
            ],
            LABEVENTS=[lab(50912, 1.1), lab(50912, 1.1) | {"hadm_id": ""}],
        )
    )
    assert [v[0] for v in made.values("hr")] == [1, 2]
    assert made.tally.refused == {
        "hadm-empty:CHARTEVENTS": 1,
        "hadm-not-in-cohort:CHARTEVENTS": 1,
        "icustay-other:CHARTEVENTS": 1,
        "unreadable-time:CHARTEVENTS": 1,
        "hadm-empty:LABEVENTS": 1,
    }
    assert made.tally.repaired == {"icustay-from-hadm:CHARTEVENTS": 1}


@pytest.mark.parametrize(
    ("table", "column"),
    [
        *(
            (t, c)
            for t in ("CHARTEVENTS", "LABEVENTS")
            for c in ("subject_id", "itemid", "charttime")
        ),
        *(
            (t, c)
            for t in ("INPUTEVENTS_MV", "PROCEDUREEVENTS_MV")
            for c in ("subject_id", "itemid", "starttime", "endtime", "statusdescription")
        ),
    ],
)
def test_a_row_without_a_key_is_damaged(source: Source, table: str, column: str) -> None:
    row = {
        "CHARTEVENTS": chart(211, 80),
        "LABEVENTS": lab(50912, 1.1),
        "INPUTEVENTS_MV": order(221906, 1, 2),
        "PROCEDUREEVENTS_MV": order(225792, 1, 2),
    }[table]
    reader = Mimic3(source(**{table: [row, row | {column: ""}]}))
    message = rf"{table}\.csv: line 3: column '{column}' is empty"
    tables = [scan.table for scan in reader.scans(reader.cohort(Tally()))]
    with pytest.raises(SourceError, match=message):
        _ = [list(table.chunks()) for table in tables]


# --- charts ---------------------------------------------------------------------------------------


def test_charted_value_is_known_when_it_was_stored(source: Source) -> None:
    rows = [
        chart(211, 80, 1, storetime=at_hour(1.5)),
        chart(211, 81, 2, storetime=at_hour(1.75)),  # entered ahead
        chart(211, 82, 3),
        chart(220045, 83, 4, error=1),
    ]
    made = extract(source(CHARTEVENTS=rows))
    assert made.values("hr") == [(1, 1.5, 80, 0), (2, 2, 81, 0), (3, 3, 82, 0)]
    assert made.tally.refused == {"charted-in-error:CHARTEVENTS": 1}
    made = extract(source(CHARTEVENTS=rows), profile="benchmark")
    assert made.values("hr") == [(n, None, 79 + n, 0) for n in (1, 2, 3, 4)]


def test_text_becomes_a_number_or_is_refused(source: Source) -> None:
    rows = [
        chart(455, "120/80", 1),
        chart(8441, "120/80", 1),
        chart(220045, ">60", 2),
        chart(220045, "60 bpm", 3, valuenum=60),
        chart(220045, "fast", 4),
        chart(220045, "", 5),
    ]
    made = extract(source(CHARTEVENTS=rows))
    assert made.values("sbp") == [(1, 1, 120, 1)]
    assert made.values("dbp") == [(1, 1, 80, 1)]
    assert made.values("hr") == [(2, 2, 60, 0), (3, 3, 60, 0)]
    assert made.tally.refused == {"not-a-number:hr": 1, "no-value:hr": 1}


def test_temperature_is_converted_by_item(source: Source) -> None:
    rows = [
        chart(678, "98.6", 1),
        chart(677, "37", 1),  # the computed twin of 678
        chart(676, "38.5", 2),
        chart(676, "98.6", 3),  # Fahrenheit under an item in Celsius
        chart(223761, "200", 4),  # would look like Fahrenheit again if it were converted once
    ]
    made = extract(source(CHARTEVENTS=rows))
    assert made.values("temp") == [(1, 1, 37, 0), (2, 2, 38.5, 0), (3, 3, 37, 0)]
    assert made.tally.refused == {"outside-limits:temp": 1}
    assert made.tally.repaired == {"fahrenheit:temp": 1}


def test_inspired_oxygen_is_a_fraction_however_it_is_charted(source: Source) -> None:
    written = ["0.4", "40", 0.4, 40, ".40", "40.0"]
    items = [189, 190, 3420, 223835]
    rows = [chart(item, value, h) for h, value in enumerate(written) for item in items]
    made = extract(source(CHARTEVENTS=rows)).values("fio2")
    assert made == [(h, h, 0.4, 0) for h in range(len(written))]


def test_coma_score_is_a_sum_or_the_charted_total(source: Source) -> None:
    rows = [
        # all three components: their sum, whatever the total says
        chart(184, "3 To speech", 1), chart(723, "1.0 ET/Trach", 1),
        chart(454, "5 Localizes Pain", 1), chart(198, "15", 1),
        # some components: the total
        chart(184, "4 Spontaneously", 2), chart(184, "4 Spontaneously", 2),
        chart(723, "5 Oriented", 2), chart(198, "11", 2),
        # one component alone: the others are carried
        chart(454, "6 Obeys Commands", 3),
        # MetaVision: the lowest eye score is the word "None"
        chart(220739, "None", 12), chart(223900, "No Response-ETT", 12),
        chart(223901, "No response", 12),
    ]  # fmt: skip
    made = extract(source(CHARTEVENTS=rows))
    assert [(h, v) for h, _, v, _ in made.values("gcs_total")] == [
        (1, 9), (2, 11), (3, 4 + 5 + 6), (12, 3)
    ]  # fmt: skip
    assert made.tally.repaired == {"summed:gcs_total": 1}
    made = extract(source(CHARTEVENTS=rows), profile="benchmark")
    assert [(h, v) for h, _, v, _ in made.values("gcs_total")] == [(1, 15), (2, 11)]


def test_a_score_beyond_its_scale_is_refused(source: Source) -> None:
    rows = [
        # There is no eye score of 5: the components are two, and the total counts.
        chart(184, "5", 1), chart(723, "5 Oriented", 1), chart(454, "6 Obeys Commands", 1),
        chart(198, "14", 1),
        chart(220739, "", 2, valuenum=0), chart(223900, "", 2, valuenum=6),
        chart(223901, "", 2, valuenum=7), chart(223901, "", 3, valuenum=6),
    ]  # fmt: skip
    made = extract(source(CHARTEVENTS=rows))
    assert [(h, v) for h, _, v, _ in made.values("gcs_total")] == [(1, 14), (3, 4 + 5 + 6)]
    assert made.tally.refused == {
        "outside-limits:gcs_eye": 2,
        "outside-limits:gcs_verbal": 1,
        "outside-limits:gcs_motor": 1,
    }


def test_items_of_each_profile(source: Source) -> None:
    only_benchmark = [
        # balloon pump, spontaneous breaths, after a manoeuvre, computed, skin, and urine
        ("mbp", 224, 80), ("mbp", 224322, 80), ("rr", 614, 12), ("rr", 651, 12),
        ("rr", 224422, 12), ("rr", 224689, 12), ("spo2", 8498, 97), ("temp", 677, 37),
        ("temp", 679, 99), ("temp", 3655, 36), ("ph", 51491, 6.5), ("ph", 51094, 6.5),
        ("ph", 50831, 7.5), ("glucose", 51478, 100),
    ]  # fmt: skip
    only_strict = [
        ("dbp", 227242, 70), ("mbp", 443, 80), ("fio2", 190, 0.5), ("fio2", 50816, 50),
        ("glucose", 3744, 120),
    ]  # fmt: skip
    in_none = [("ph", 220734, 6)]  # the dipstick of the ward
    rows = list(enumerate(only_benchmark + only_strict + in_none))
    from_lab = [lab(item, v, h) for h, (_, item, v) in rows if 50800 <= item < 51600]
    charted = [chart(item, v, h) for h, (_, item, v) in rows if not 50800 <= item < 51600]
    folder = source(LABEVENTS=from_lab, CHARTEVENTS=charted)
    strict, benchmark = extract(folder), extract(folder, profile="benchmark")
    for hour, (variable, item, value) in rows:
        found = bool(strict.values(variable, at=hour)), bool(benchmark.values(variable, at=hour))
        row = (variable, item, value)
        assert found == (row in only_strict, row in only_benchmark), item


# --- quirks of the benchmark ----------------------------------------------------------------------


def test_benchmark_reads_values_as_it_does(source: Source) -> None:
    made = extract(
        source(
            CHARTEVENTS=[
                chart(211, "101", 1), chart(220045, "99", 1),  # "99" > "101" as text
                chart(455, "101", 1), chart(51, "99", 1),  # pressures are numbers
                chart(223835, "0.4", 1), chart(189, "0.4", 2, valueuom="torr"),
                chart(223761, "78", 1), chart(676, "79", 2),
                chart(646, "0.97", 1),
                chart(220045, "1000", 2),
            ],
            LABEVENTS=[lab(50931, ">500"), lab(50931, "98", 2)],
        ),
        profile="benchmark",
    )  # fmt: skip
    assert made.values("hr") == [(1, None, 99, 0), (2, None, 1000, 0)]
    assert made.values("sbp") == [(1, None, 101, 0)]
    assert made.values("fio2") == [(1, None, 0.004, 0), (2, None, 0.4, 0)]
    assert made.values("temp") == [(1, None, 78, 0), (2, None, pytest.approx(26.111111), 0)]
    assert made.values("spo2") == [(1, None, 97, 0)]
    assert made.values("glucose") == [(2, None, 98, 0)]
    assert made.tally.refused == {"same-time:observation": 2, "text-result:glucose": 1}
