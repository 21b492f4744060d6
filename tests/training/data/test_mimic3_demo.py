"""The MIMIC-III demo: counts, and values that were read off its files by hand.

The comments say in which row (row_id) of which file a number stands.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from llm4ehr.store import EpisodeStore
from tests.training.data.mimic3_source import Extraction, extract
from training.data.mimic.shared import chart_items
from training.data.prepare import prepare


@pytest.fixture(scope="module")
def demo(llm4ehr_data: Path) -> Path:
    folder = llm4ehr_data / "mimic-iii-demo-1.4"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="module")
def strict(demo: Path) -> Extraction:
    return extract(demo)


@pytest.fixture(scope="module")
def benchmark(demo: Path) -> Extraction:
    return extract(demo, profile="benchmark")


def hms(hours: int, minutes: int, seconds: int = 0) -> float:
    return round(hours + minutes / 60 + seconds / 3600, 6)


def test_demo_carevue_stay_with_blood_gases(strict: Extraction, benchmark: Extraction) -> None:
    # ICUSTAYS: stay 256345 from 2107-01-05 00:03:45, admission 169938, CareVue
    stay = 256345
    # CHARTEVENTS 86098455: FiO2 .60000002384185791 at 01:00, stored 01:18
    assert strict.values("fio2", stay, hms(0, 56, 15)) == [(hms(0, 56, 15), hms(1, 14, 15), 0.6, 0)]
    # 86098506: 94.599998474121094 Fahrenheit at 01:15, stored 01:24
    first = strict.values("temp", stay)[0]
    assert first == (hms(1, 11, 15), hms(1, 20, 15), round(62.599998474 * 5 / 9, 6), 0)
    # 203608984: cuff 135 at 01:15; 203609103: arterial line 135 at 04:30, stored 05:01
    assert strict.values("sbp", stay)[0] == (hms(1, 11, 15), hms(1, 16, 15), 135, 1)
    assert strict.values("sbp", stay, hms(4, 26, 15)) == [
        (hms(4, 26, 15), hms(4, 57, 15), 135, 0),
        # 203609105: the cuff at the same time
        (hms(4, 26, 15), hms(4, 57, 15), 104, 1),
    ]
    # LABEVENTS 6277368: pH 7.45 at 04:35, arterial (6277360); its copies are CHARTEVENTS 86098998
    # and 86099000. 6277320: pH 7.24 at 02:25 in mixed blood (6277309).
    assert strict.values("ph", stay, hms(4, 31, 15)) == [(hms(4, 31, 15), hms(5, 1, 15), 7.45, 0)]
    assert strict.values("ph", stay)[0] == (hms(2, 21, 15), hms(2, 51, 15), 7.24, 1)
    # 6277317: its saturation of 69 % is not one of arterial blood
    assert strict.values("spo2", stay, hms(2, 21, 15)) == []
    assert strict.events("MIMIC/LAB/50817", stay)[0] == (hms(2, 21, 15), hms(2, 51, 15), 69)
    assert benchmark.values("spo2", stay, hms(2, 21, 15)) == [(hms(2, 21, 15), None, 69, 0)]
    # 6277369: pO2 235 at 04:35 (arterial), 6277321: 42 at 02:25 (mixed)
    assert strict.events("LOINC/2703-7", stay)[0] == (hms(4, 31, 15), hms(5, 1, 15), 235)
    assert strict.events("MIMIC/LAB/50821", stay)[0] == (hms(2, 21, 15), hms(2, 51, 15), 42)
    # 6277331: glucose 118 at 04:23, copied to CHARTEVENTS 86098950 and 86098969
    # 6277330: creatinine 1.3 at 04:23
    at = hms(4, 19, 15)
    assert strict.values("glucose", stay, at) == [(at, hms(6, 19, 15), 118, 0)]
    assert strict.events("LOINC/2160-0", stay)[0] == (at, hms(6, 19, 15), 1.3)
    # CHARTEVENTS 86098483, 86098508 and 86098492: 1 + 1 + 1 at 01:15, stored 01:51
    assert strict.values("gcs_total", stay)[0] == (hms(1, 11, 15), hms(1, 47, 15), 3, 0)


def test_demo_metavision_stay_ending_in_death(strict: Extraction, benchmark: Extraction) -> None:
    # ICUSTAYS: stay 297782 from 2152-10-09 19:05:36 to 23:39:43, LOS 0.1904
    # ADMISSIONS: 167612, DEATHTIME 2152-10-09 22:33
    made = strict.stay(297782)
    assert made["mortality"]
    assert round(made["end_hours"], 6) == hms(3, 27, 24) == round(made["death_hours_low"], 6)
    assert made["n_hours"] == 4
    assert benchmark.stay(297782)["end_hours"] == pytest.approx(0.1904 * 24)
    # CHARTEVENTS 7348779: heart rate 96 at 20:27, stored 20:32; 7348811: 0 at 22:30, stored 22:42
    assert strict.values("hr", 297782) == [
        (hms(1, 21, 24), hms(1, 26, 24), 96, 0),
        (hms(1, 54, 24), hms(2, 40, 24), 96, 0),
        (hms(2, 54, 24), hms(2, 58, 24), 97, 0),
    ]
    assert benchmark.values("hr", 297782)[-1] == (hms(3, 24, 24), None, 0, 0)
    # 7348759: FiO2 100 at 20:25, stored 20:29; 7348810: 40 at 22:00, stored at 21:58 already
    assert strict.values("fio2", 297782) == [
        (hms(1, 19, 24), hms(1, 23, 24), 1, 0),
        (hms(2, 54, 24), hms(2, 54, 24), 0.4, 0),
    ]
    # 7348792: 97.1 Fahrenheit at 20:32
    assert strict.values("temp", 297782)[0][2] == round(65.1 * 5 / 9, 6)
    # 274240839, 274240843, 274240844: eyes open (4), tube (1), obeys (6) at 20:35, stored 20:36
    assert strict.values("gcs_total", 297782) == [(hms(1, 29, 24), hms(1, 30, 24), 11, 0)]
    assert benchmark.values("gcs_total", 297782) == []
    # INPUTEVENTS_MV 197791: fentanyl 25 mcg/hour from 21:15 to 22:25
    assert strict.events("MIMIC/INPUT_START/221744", 297782) == [(hms(2, 9, 24), None, 25.000001)]
    assert strict.events("MIMIC/INPUT_END/221744", 297782) == [(hms(3, 19, 24), None, None)]
    # 197804: saline from 20:33, rewritten; 197797: a bolus at 21:15, 197796: 1 mL/hour from 21:16
    assert strict.events("MIMIC/INPUT_START/225158", 297782) == [
        (hms(2, 9, 24), None, None),
        (hms(2, 10, 24), None, 1),
    ]
    # PROCEDUREEVENTS_MV 14566: ventilation from 20:32 to 22:38, when the patient is dead
    assert strict.events("MIMIC/PROCEDURE_START/225792", 297782) == [(hms(1, 26, 24), None, None)]
    assert strict.events("MIMIC/PROCEDURE_END/225792", 297782) == []


def test_demo_carevue_stay_of_a_survivor(strict: Extraction, benchmark: Extraction) -> None:
    # ICUSTAYS: stay 206504 from 2164-10-23 21:10:15 to 2164-10-25 12:21:07, LOS 1.6325; MICU
    made = strict.stay(206504)
    assert (made["mortality"], made["sex"], made["unit_type"]) == (False, "female", "medical")
    assert round(made["los_hours"], 6) == hms(39, 10, 52)
    assert benchmark.stay(206504)["los_hours"] == pytest.approx(39.18)
    # PATIENTS: born 2094-03-05, 25,799 days before
    assert made["age_years"] == pytest.approx((25799 + 76215 / 86400) / 365)
    # CHARTEVENTS 85780466: 99.6 Fahrenheit at 22:40, stored 22:50; its twin in Celsius 85780465
    at = hms(1, 29, 45)
    temperature = round((99.599998474121094 - 32) * 5 / 9, 6)
    assert strict.values("temp", 206504, at) == [(at, hms(1, 39, 45), temperature, 0)]
    # 85780488, 85780514, 85780498: 4 + 5 + 6 at 23:00, stored 22:57
    assert strict.values("gcs_total", 206504)[0] == (hms(1, 49, 45), None, 15, 0)
    # LABEVENTS 6245268: creatinine 3.5 at 03:00; 6245262: lactate at 21:03, before admission
    assert strict.events("LOINC/2160-0", 206504)[0] == (hms(5, 49, 45), hms(7, 49, 45), 3.5)
    assert benchmark.events("LOINC/2160-0", 206504)[0] == (hms(5, 49, 45), None, 3.5)
    # 6245289: the first lactate of the stay, 1.3 at 05:58
    assert strict.events("LOINC/2524-7", 206504)[0] == (hms(8, 47, 45), hms(9, 17, 45), 1.3)
    # CHARTEVENTS 85780589: fingerstick 98 at 03:00, stored 03:08; LABEVENTS 6245269: glucose 84,
    # copied to 85780590 and 85780615
    assert strict.values("glucose", 206504, hms(5, 49, 45)) == [
        (hms(5, 49, 45), hms(7, 49, 45), 84, 0),
        (hms(5, 49, 45), hms(5, 57, 45), 98, 1),
    ]
    # DIAGNOSES_ICD 112344 and 112353 (2), 112347 (99), 112348 (106), 112349 (108), 112359 (49),
    # 112362 (101); in brackets the CCS group
    assert made["phenotypes"] == [
        "Cardiac dysrhythmias",
        "Congestive heart failure; nonhypertensive",
        "Coronary atherosclerosis and other heart disease",
        "Diabetes mellitus without complication",
        "Hypertension with complications and secondary hypertension",
        "Septicemia (except in labor)",
    ]


def test_demo_stay_with_a_death_after_discharge(strict: Extraction, benchmark: Extraction) -> None:
    # ADMISSIONS 39980: DEATHTIME 2155-03-12 15:00, DISCHTIME 2155-03-11 15:00
    # ICUSTAYS: stay 279183 from 2155-03-10 01:54:58 to 2155-03-11 17:58:58
    made = strict.stay(279183)
    assert made["mortality"]
    assert not benchmark.stay(279183)["mortality"]
    assert round(made["death_hours_low"], 6) == hms(61, 5, 2)
    assert round(made["end_hours"], 6) == hms(40, 4)
    # CHARTEVENTS 271308373, ...77, ...78: "None", "No Response", "No response" at 02:10
    assert strict.values("gcs_total", 279183)[0] == (hms(0, 15, 2), hms(0, 17, 2), 3, 0)


def test_demo_stays_with_an_error_and_with_a_hidden_age(
    strict: Extraction, benchmark: Extraction
) -> None:
    # CHARTEVENTS 6570562: 125 mmHg at 2145-09-07 15:44, ERROR 1; stay 293178 from 09-06 08:54
    assert strict.values("sbp", 293178, hms(30, 50)) == []
    assert benchmark.values("sbp", 293178, hms(30, 50)) == [(hms(30, 50), None, 125, 0)]
    # PATIENTS: DOB 1844-07-18 of patient 40655, 300 years before the stay
    assert strict.stay(220016)["age_years"] == 90


STRICT_COUNTS = {
    "dbp": 12561,
    "fio2": 2095,
    "gcs_total": 3210,
    "glucose": 2779,
    "hr": 12074,
    "mbp": 12540,
    "ph": 784,
    "rr": 12690,
    "sbp": 12564,
    "spo2": 12111,
    "temp": 3623,
    "events": 34739,
}
BENCHMARK_COUNTS = {
    "dbp": 11935,
    "fio2": 1016,
    "gcs_total": 1541,
    "glucose": 2978,
    "hr": 12153,
    "mbp": 11902,
    "ph": 995,
    "rr": 12344,
    "sbp": 11942,
    "spo2": 12252,
    "temp": 3622,
    "events": 35027,
}
STRICT_REFUSED = {
    "after-end:event": 7763,
    "after-end:observation": 845,
    "before-admission:event": 6063,
    "before-admission:observation": 836,
    "charted-in-error:CHARTEVENTS": 40,
    "copy-of-lab:glucose": 1376,
    "copy-of-lab:ph": 1155,
    "copy-of-lab:spo2": 166,
    "duplicate:event": 85,
    "duplicate:observation": 340,
    "hadm-empty:LABEVENTS": 13184,
    "hadm-not-in-cohort:CHARTEVENTS": 11018,
    "hadm-not-in-cohort:INPUTEVENTS_MV": 2203,
    "hadm-not-in-cohort:LABEVENTS": 9650,
    "hadm-not-in-cohort:PROCEDUREEVENTS_MV": 71,
    "icustay-other:CHARTEVENTS": 216,
    "icustay-other:INPUTEVENTS_MV": 24,
    "icustay-other:PROCEDUREEVENTS_MV": 7,
    "no-value:fio2": 8,
    "no-value:gcs_eye": 1,
    "no-value:gcs_motor": 4,
    "no-value:gcs_total": 1,
    "no-value:gcs_verbal": 6,
    "no-value:glucose": 17,
    "no-value:hr": 4,
    "no-value:mbp": 18,
    "no-value:rr": 6,
    "no-value:sbp": 19,
    "no-value:spo2": 16,
    "no-value:temp": 16,
    "not-a-number:ph": 2,
    "outside-limits:fio2": 8,
    "outside-limits:mbp": 7,
    "outside-limits:ph": 2,
    "outside-limits:sbp": 1,
    "rewritten:INPUTEVENTS_MV": 2185,
    "rewritten:PROCEDUREEVENTS_MV": 22,
    "text-result:lab": 5114,
    "zero:dbp": 29,
    "zero:hr": 14,
    "zero:mbp": 4,
    "zero:rr": 42,
    "zero:sbp": 31,
    "zero:spo2": 9,
}
STRICT_REPAIRED = {
    "icustay-from-hadm:CHARTEVENTS": 3,
    "percent:fio2": 1242,
    "summed:gcs_total": 1565,
}


def test_demo_counts(strict: Extraction, benchmark: Extraction) -> None:
    waterfall = [(136, 100), (126, 94), (126, 94), (115, 90), (114, 89)]
    for made, more in ((strict, [(114, 89)] * 2), (benchmark, [(114, 89)])):
        assert [(s.stays, s.subjects) for s in made.cohort.waterfall] == waterfall + more
    assert strict.cohort.stays["mortality"].sum() == 32
    assert benchmark.cohort.stays["mortality"].sum() == 31

    def counts(made: Extraction) -> dict[str, int]:
        of = made.items.observations.group_by("variable").len().sort("variable")
        return dict(of.iter_rows()) | {"events": len(made.items.events)}

    assert counts(strict) == STRICT_COUNTS
    assert counts(benchmark) == BENCHMARK_COUNTS
    assert dict(strict.tally.refused) == STRICT_REFUSED
    assert dict(strict.tally.repaired) == STRICT_REPAIRED


def test_demo_agrees_with_sql(demo: Path, strict: Extraction, benchmark: Extraction) -> None:
    """Another engine, straight on the files, counts the same stays and rows by rule."""
    duckdb = pytest.importorskip("duckdb")
    sql = duckdb.connect()
    for table in ("ICUSTAYS", "PATIENTS", "CHARTEVENTS", "LABEVENTS", "INPUTEVENTS_MV"):
        sql.execute(
            f"CREATE VIEW {table} AS SELECT * FROM read_csv('{demo / table}.csv.gz', "
            "all_varchar = true, delim = ',', quote = '\"', escape = '\"')"
        )
    sql.execute(
        """
        CREATE TABLE unmoved AS SELECT *, count(*) OVER (PARTITION BY hadm_id) AS n FROM ICUSTAYS
          WHERE first_wardid = last_wardid AND first_careunit = last_careunit;
        CREATE TABLE cohort AS SELECT s.* FROM unmoved s JOIN PATIENTS p USING (subject_id)
          WHERE n = 1 AND date_diff('second', dob::TIMESTAMP, intime::TIMESTAMP) >= 18*365*86400
        """
    )

    def count(query: str) -> int:
        return int(sql.execute(f"SELECT count(*) FROM {query}").fetchone()[0])

    stays = [count("ICUSTAYS"), count("unmoved"), count("unmoved WHERE n = 1"), count("cohort")]
    for made in (strict, benchmark):
        steps = [step.stays for step in made.cohort.waterfall]
        assert [steps[0], steps[1], steps[3], steps[4]] == stays
    ids = sql.execute("SELECT icustay_id FROM cohort ORDER BY icustay_id").fetchall()
    assert strict.cohort.stays["episode_id"].to_list() == [i for (i,) in ids]

    def rules(table: str, items: str, *, named: bool) -> dict[str, int]:
        other = "e.icustay_id <> s.icustay_id" if named else "false"
        unnamed = "e.icustay_id IS NULL" if named else "false"
        row = sql.execute(
            f"""
            SELECT count(*) FILTER (e.hadm_id IS NULL) AS "hadm-empty",
              count(*) FILTER (e.hadm_id IS NOT NULL AND s.hadm_id IS NULL)
                AS "hadm-not-in-cohort",
              count(*) FILTER ({other}) AS "icustay-other",
              count(*) FILTER (s.hadm_id IS NOT NULL AND {unnamed}) AS "icustay-from-hadm"
            FROM {table} e LEFT JOIN cohort s USING (subject_id, hadm_id)
            WHERE e.subject_id IN (SELECT subject_id FROM cohort) AND {items}
            """
        )
        names = [column[0] for column in row.description]
        found = dict(zip(names, row.fetchone(), strict=True))
        return {f"{rule}:{table}": n for rule, n in found.items() if n}

    def ours(made: Extraction, table: str) -> dict[str, int]:
        counted = made.tally.refused + made.tally.repaired
        rules = ("hadm-", "icustay-")
        return {k: n for k, n in counted.items() if k.endswith(table) and k.startswith(rules)}

    for made, profile in ((strict, "strict"), (benchmark, "benchmark")):
        read = chart_items(profile)["itemid"].cast(pl.String).to_list()
        sql.execute("CREATE OR REPLACE TABLE items AS SELECT unnest($1) AS itemid", [read])
        chart_rows = rules("CHARTEVENTS", "itemid IN (SELECT itemid FROM items)", named=True)
        assert ours(made, "CHARTEVENTS") == chart_rows
        assert ours(made, "INPUTEVENTS_MV") == rules("INPUTEVENTS_MV", "true", named=True)
        lab_rows = rules("LABEVENTS", "true", named=False)
        assert ours(made, "LABEVENTS") == lab_rows


@pytest.mark.parametrize("profile", ["strict", "benchmark"])
def test_demo_becomes_a_store(demo: Path, tmp_path: Path, profile: str) -> None:
    info = prepare("mimic3", demo, tmp_path / "store", progress=False, profile=profile)
    # Of the 114 stays of the cohort, one has no value of any variable.
    assert info.counts["episodes"] == 113
    assert info.options["profile"] == profile
    store = EpisodeStore.open(tmp_path / "store", verify=True)
    assert store.info == info
