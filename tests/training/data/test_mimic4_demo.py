"""The MIMIC-IV reader on the open demo: values by hand, counts by SQL."""

from __future__ import annotations

from pathlib import Path

import duckdb
import polars as pl
import pytest

from tests.training.data.mimic4_source import Extraction

# The demo. Times in comments are those of the files, hours are since `intime` of icustays.csv.gz.


@pytest.fixture(scope="module")
def folder(llm4ehr_data: Path) -> Path:
    return llm4ehr_data / "mimic-iv-demo-2.2"


@pytest.fixture(scope="module")
def demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    return Extraction(folder, tmp_path_factory.mktemp("mimic4"))


def test_demo_cohort_against_sql(demo: Extraction, folder: Path) -> None:
    assert [(step.stays, step.subjects) for step in demo.waterfall] == [
        (140, 100), (129, 96), (129, 96), (112, 91), (112, 91), (112, 91), (112, 91), (112, 91),
    ]  # fmt: skip
    of = {
        name: f"read_csv('{folder}/{path}.csv.gz')"
        for name, path in (("i", "icu/icustays"), ("a", "hosp/admissions"), ("p", "hosp/patients"))
    }
    expected = duckdb.sql(f"""
        WITH alone AS (
            SELECT *, count(*) OVER (PARTITION BY hadm_id) AS n
            FROM {of["i"]} WHERE first_careunit = last_careunit
        )
        SELECT stay_id::VARCHAR, s.subject_id::VARCHAR, hospital_expire_flag = 1,
            least(90, anchor_age + year(intime) - anchor_year)::DOUBLE,
            date_diff('second', intime, least(outtime, coalesce(deathtime, outtime))) / 3600.0
        FROM alone s JOIN {of["a"]} a USING (hadm_id)
            JOIN {of["p"]} p ON p.subject_id = s.subject_id
        WHERE n = 1 ORDER BY stay_id::VARCHAR
    """).fetchall()
    found = demo.episodes.select(
        "episode_id", "subject_id", "mortality", "age_years", "los_hours"
    ).rows()
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    assert [row[4] for row in found] == pytest.approx([row[4] for row in expected])
    assert sum(row[2] for row in expected) == 10


def test_demo_counts(demo: Extraction) -> None:
    assert dict(demo.observations.group_by("variable").len().rows()) == {
        "dbp": 10752, "fio2": 1397, "gcs_total": 2538, "glucose": 2090, "hr": 10380, "mbp": 10739,
        "ph": 634, "rr": 11088, "sbp": 10751, "spo2": 10188, "temp": 2920,
    }  # fmt: skip
    kind = pl.col("code").str.extract("^(LOINC|MIMIC/[A-Z_]+)/")
    assert dict(demo.events.group_by(kind).len().rows()) == {
        "LOINC": 10983,
        "MIMIC/LAB": 10844,
        "MIMIC/INPUT_START": 15318,
        "MIMIC/INPUT_END": 3644,
        "MIMIC/PROCEDURE_START": 1145,
        "MIMIC/PROCEDURE_END": 513,
    }
    assert demo.codes.height == 544


def within_stays(demo: Extraction) -> duckdb.DuckDBPyConnection:
    """A database with the table `ends`: episode_id and los_hours."""
    connection = duckdb.connect()
    connection.register("ends", demo.episodes.select("episode_id", "los_hours").to_arrow())
    return connection


def test_demo_heart_rates_against_sql(demo: Extraction, folder: Path) -> None:
    """Item 220045 within stays of the cohort, without the zero."""
    (expected,) = (
        within_stays(demo)
        .execute(f"""
        SELECT count(DISTINCT (stay_id, charttime, valuenum))
        FROM read_csv('{folder}/icu/chartevents.csv.gz') c
        JOIN read_csv('{folder}/icu/icustays.csv.gz') i USING (stay_id)
        JOIN ends e ON e.episode_id = stay_id::VARCHAR
        WHERE itemid = 220045 AND valuenum BETWEEN 1 AND 350 AND charttime >= intime
            AND date_diff('second', intime, charttime) <= los_hours * 3600
    """)
        .fetchall()[0]
    )
    assert demo.observations.filter(variable="hr").height == expected


def test_demo_creatinine_against_sql(demo: Extraction, folder: Path) -> None:
    """Item 50912 drawn in a stay of the cohort and known, two hours later, before its end."""
    expected = (
        within_stays(demo)
        .execute(f"""
        SELECT stay_id::VARCHAR, date_diff('second', intime, charttime) AS seconds, max(valuenum)
        FROM read_csv('{folder}/hosp/labevents.csv.gz') l
        JOIN read_csv('{folder}/icu/icustays.csv.gz') i USING (subject_id)
        JOIN ends e ON e.episode_id = stay_id::VARCHAR
        WHERE itemid = 50912 AND valuenum IS NOT NULL AND charttime >= intime
            AND seconds + 7200 <= los_hours * 3600
        GROUP BY ALL
    """)
        .fetchall()
    )
    found = demo.events.filter(code="LOINC/2160-0").select(
        "episode_id", (pl.col("hours") * 3600).round().cast(pl.Int64), "value"
    )
    assert sorted(found.rows()) == sorted(expected)


def test_demo_stay_39553978(demo: Extraction) -> None:
    # icustays: 2180-07-23 14:00:00 to 23:50:47, MICU; patients: 10000032, F, 52 in 2180
    stay = 39553978
    facts = demo.episode(stay)
    assert facts["los_hours"] == pytest.approx(9.8464, abs=1e-4)
    assert (facts["n_hours"], facts["age_years"], facts["mortality"]) == (10, 52, False)
    assert facts["phenotypes"] == [  # diagnoses_icd, version 9:
        "Chronic obstructive pulmonary disease and bronchiectasis",  # 496
        "Complications of surgical procedures or medical care",  # 45829
        "Fluid and electrolyte disorders",  # 2761, 2767
        "Other liver diseases",  # 5715, 78959
        "Respiratory failure; insufficiency; arrest (adult)",  # V462
    ]
    # chartevents
    assert demo.observed(stay, "hr")[0] == (0.2, None, 91, 0)  # 220045 at 14:12
    assert demo.observed(stay, "sbp")[0] == (0.1833, None, 84, 1)  # 220179 at 14:11
    assert demo.observed(stay, "temp")[0] == (0.0, None, 37.0556, 0)  # 223761 at 14:00: 98.7 F
    # 220739, 223900 and 223901 at 14:45: 4, 4 and 6
    assert demo.observed(stay, "gcs_total")[0] == (0.75, None, 14, 0)
    # labevents 50931 at 21:45: 115, known two hours later; the same in 220621 at 21:45 is a copy
    assert demo.observed(stay, "glucose") == [(7.75, 9.75, 115, 0)]
    assert demo.happened(stay, "LOINC/2160-0") == [(7.75, 9.75, 0.5)]  # 50912 at 21:45
    # inputevents 220862: 17:00 to 17:30 and 17:33 to 18:03, rate 100
    albumin = [row[0] for row in demo.happened(stay, "MIMIC/INPUT_START/220862")]
    assert albumin[:2] == [3.0, 3.55]
    assert demo.happened(stay, "MIMIC/INPUT_END/220862")[0] == (3.5, None, None)
    # procedureevents 224275: 14:24 to 23:50
    assert demo.happened(stay, "MIMIC/PROCEDURE_START/224275") == [(0.4, None, None)]
    assert demo.happened(stay, "MIMIC/PROCEDURE_END/224275") == [(9.8333, None, None)]


def test_demo_stay_30101877(demo: Extraction) -> None:
    # icustays: 2143-03-22 06:42:00 to 03-25 15:05:33; patients: dod 2143-03-30, after discharge
    stay = 30101877
    facts = demo.episode(stay)
    assert (facts["mortality"], facts["death_hours_low"], facts["n_hours"]) == (False, None, 81)
    assert facts["phenotypes"] == [  # diagnoses_icd, version 9:
        "Acute cerebrovascular disease",  # 431
        "Diabetes mellitus without complication",  # 25000
        "Disorders of lipid metabolism",  # 2720
        "Essential hypertension",  # 4019
    ]
    assert demo.observed(stay, "temp")[0] == (0.3, None, 37.8333, 0)  # 223761 at 07:00: 100.1 F
    assert demo.observed(stay, "fio2")[0] == (3.3, None, 0.5, 0)  # 223835 at 10:00: 50
    # 220739, 223900, 223901 at 08:27: 3, 1, 1; at 09:00: 4, 1, 6
    assert demo.observed(stay, "gcs_total")[:2] == [(1.75, None, 5, 0), (2.3, None, 11, 0)]
    # labevents 50931 at 07:31: 153 (copied to 220621 at 07:31); 225664 at 08:00: 178
    assert demo.observed(stay, "glucose")[:2] == [(0.8167, 2.8167, 153, 0), (1.3, None, 178, 1)]
    # inputevents 225158: 08:26 to 11:24, rate 200
    assert demo.happened(stay, "MIMIC/INPUT_START/225158")[0] == (1.7333, None, 200)


def test_demo_stay_39061571(demo: Extraction) -> None:
    # icustays: 2185-01-17 19:12:12 to 01-22 16:16:52; admissions: deathtime 2185-01-22 14:25:00
    stay = 39061571
    facts = demo.episode(stay)
    assert facts["mortality"]
    assert facts["death_hours_low"] == facts["los_hours"] == pytest.approx(115.2133, abs=1e-4)
    # labevents 50820 at 19:30: 7.1, 21:25: 7.11, 22:30: 7.14; the specimen is not told.
    # Their copies in 220274 and 223830, and the dipsticks of 6 (220734 at 21:32), are left out.
    assert demo.observed(stay, "ph")[:3] == [
        (0.2967, 0.7967, 7.1, 1),
        (2.2133, 2.7133, 7.11, 1),
        (3.2967, 3.7967, 7.14, 1),
    ]
    # chartevents 220179 at 19:15: 117; 220050 at 21:09: 130
    assert demo.observed(stay, "sbp")[0] == (0.0467, None, 117, 1)
    assert (1.9467, None, 130, 0) in demo.observed(stay, "sbp")
    assert (16.83, None, 39.4, 0) in demo.observed(stay, "temp")  # 223762 at 01-18 12:02
    # 223835 at 19:12, before admission by twelve seconds; at 20:00: 100
    assert demo.observed(stay, "fio2")[0] == (0.7967, None, 1.0, 0)
    # inputevents 221906 from 19:30 on, rate 0.40043247
    assert demo.happened(stay, "MIMIC/INPUT_START/221906")[0] == (0.2967, None, 0.4004)
    # procedureevents 225792: 19:15 to 01-22 14:02
    assert demo.happened(stay, "MIMIC/PROCEDURE_START/225792") == [(0.0467, None, None)]
    assert demo.happened(stay, "MIMIC/PROCEDURE_END/225792") == [(114.83, None, None)]


def test_demo_stay_32119961(demo: Extraction) -> None:
    # icustays: 2155-12-02 20:33:00 to 12-07 18:19:18, CCU; admissions: deathtime 12-07 15:30:00
    stay = 32119961
    facts = demo.episode(stay)
    assert (facts["unit_type"], facts["age_years"], facts["mortality"]) == ("coronary", 89, True)
    assert facts["los_hours"] == facts["death_hours_low"] == 114.95
    assert facts["phenotypes"] == [  # diagnoses_icd, version 10:
        "Acute myocardial infarction",  # I214
        "Cardiac dysrhythmias",  # I480
        "Chronic kidney disease",  # N186, Z992
        "Chronic obstructive pulmonary disease and bronchiectasis",  # J449
        "Conduction disorders",  # I447, Z45018
        "Congestive heart failure; nonhypertensive",  # I5033
        "Coronary atherosclerosis and other heart disease",  # I2510
        "Disorders of lipid metabolism",  # E785
        "Hypertension with complications and secondary hypertension",  # I132
        "Other liver diseases",  # R740
        "Respiratory failure; insufficiency; arrest (adult)",  # J9690, Z9981
        "Septicemia (except in labor)",  # R7881
    ]
    # labevents 50813 at 12-03 00:15: 2.3, a blood gas: known after half an hour
    assert demo.happened(stay, "LOINC/2524-7")[0] == (3.7, 4.2, 2.3)
    # inputevents 225152: 12-02 20:54 to 12-04 00:40, rate 900.36017
    assert demo.happened(stay, "MIMIC/INPUT_START/225152")[0] == (0.35, None, 900.3602)


def test_demo_stay_30425410(demo: Extraction) -> None:
    # icustays: 2178-07-22 08:19:00 to 07-25 16:42:43
    stay = 30425410
    assert demo.episode(stay)["phenotypes"] == [  # diagnoses_icd, version 10:
        "Diabetes mellitus without complication",  # E119
        "Other upper respiratory disease",  # J9809, Z930
        "Respiratory failure; insufficiency; arrest (adult)",  # J9621, Z9911
    ]
    # 223835 at 08:00 lies before admission; at 12:00: 40
    assert demo.observed(stay, "fio2")[0] == (3.6833, None, 0.4, 0)
    # 220739, 223900, 223901 at 09:00: 4, 1, 6
    assert demo.observed(stay, "gcs_total")[0] == (0.6833, None, 11, 0)
    # 225664 at 09:00: 155
    assert demo.observed(stay, "glucose")[0] == (0.6833, None, 155, 1)


def test_demo_death_on_the_ward_and_the_oldest(demo: Extraction) -> None:
    # icustays: 2137-08-10 19:54:51 to 08-13 17:54:54; admissions: deathtime 2137-09-02 17:05:00
    facts = demo.episode(34577403)
    assert facts["mortality"]
    assert facts["los_hours"] == pytest.approx(70.0008, abs=1e-4)
    assert facts["death_hours_low"] == pytest.approx(549.1692, abs=1e-4)
    assert facts["age_years"] == 75  # patients: 72 in 2134
    assert demo.episode(31338022)["age_years"] == 90  # patients: 91


def test_demo_items_known_only_after_they_are_true(demo: Extraction) -> None:
    for frame in (demo.observations, demo.events):
        known = frame.drop_nulls("available_hours")
        assert (known["available_hours"] >= known["hours"]).all()
        ends = dict(demo.episodes.select("episode_id", "los_hours").rows())
        last = pl.max_horizontal("hours", "available_hours")
        end = pl.col("episode_id").replace_strict(ends, return_dtype=pl.Float64)
        assert frame.select((last <= end).all()).item()
