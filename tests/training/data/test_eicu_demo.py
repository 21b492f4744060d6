"""The eICU reader on the open demo: values by hand, counts by SQL."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.training.data.eicu_source import Extraction, extract

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
