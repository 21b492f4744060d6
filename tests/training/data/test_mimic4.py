"""MIMIC-IV: the official layout, every rule on a made-up set, and checked numbers of the demo."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import polars as pl
import pytest

from training.data.build import build_store
from training.data.extraction import Step
from training.data.mimic.mimic4 import Mimic4
from training.data.sources import SourceError, Tally

UNITS = "Medical Intensive Care Unit (MICU)"
TABLES = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,"
    "hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "hosp/d_labitems": "itemid,label,fluid,category",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,"
    "charttime,storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,"
    "comments",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,"
    "highnormalvalue",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,"
    "valuenum,valueuom,warning",
    "icu/inputevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,itemid,"
    "amount,amountuom,rate,rateuom,orderid,linkorderid,statusdescription",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,caregiver_id,starttime,endtime,storetime,"
    "itemid,value,valueuom,orderid,linkorderid,statusdescription",
}

Rows = Mapping[str, list[dict[str, object]]]


def a_patient(n: int, **changes: object) -> dict[str, list[dict[str, object]]]:
    """Patient `n` with one admission and one ICU stay from 2180-05-01 10:00 on, for two days."""
    ids = {"subject_id": n, "hadm_id": 100 + n}
    facts: dict[str, object] = {
        "gender": "F", "anchor_age": 60, "anchor_year": 2178, "deathtime": "", "dod": "",
        "hospital_expire_flag": 0, "first_careunit": UNITS, "last_careunit": UNITS,
        "intime": "2180-05-01 10:00:00", "outtime": "2180-05-03 10:00:00", "stay_id": 1000 + n,
    } | ids | changes  # fmt: skip
    return {name: [facts] for name in ("hosp/patients", "hosp/admissions", "icu/icustays")} | {
        "icu/chartevents": [
            facts | {"charttime": "2180-05-01 11:00:00", "itemid": 220045, "value": 80}
        ]
    }


def write(folder: Path, *parts: Rows, without: tuple[str, ...] = ()) -> Path:
    """The tables of `parts` in the published layout."""
    for name, header in TABLES.items():
        if name in without:
            continue
        lines = [header]
        for part in parts:
            for row in part.get(name, []):
                lines.append(",".join(str(row.get(column, "")) for column in header.split(",")))
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
    return folder


class Extraction:
    """What `prepare` would write, as frames."""

    def __init__(self, source: Path, work: Path, **options: float) -> None:
        self.waterfall = build_store(
            Mimic4(source, **options), work / "store", work / "work", progress=False
        )
        read = {
            name: pl.read_parquet(work / "store" / f"{name}.parquet").with_columns(
                pl.col(pl.Categorical, pl.Enum).cast(pl.String)
            )
            for name in ("episodes", "observations", "events", "codes")
        }
        self.episodes, self.observations = read["episodes"], read["observations"]
        self.events, self.codes = read["events"], read["codes"]

    def episode(self, stay: int) -> dict[str, object]:
        return self.episodes.row(by_predicate=pl.col("episode_id") == str(stay), named=True)

    def observed(self, stay: int, variable: str) -> list[tuple[float, ...]]:
        """(hours, available hours, value, priority), rounded."""
        return _rows(
            self.observations.filter(episode_id=str(stay), variable=variable),
            ["hours", "available_hours", "value", "priority"],
        )

    def happened(self, stay: int, code: str) -> list[tuple[float, ...]]:
        """(hours, available hours, value), rounded."""
        return _rows(
            self.events.filter(episode_id=str(stay), code=code),
            ["hours", "available_hours", "value"],
        )


def _rows(frame: pl.DataFrame, columns: list[str]) -> list[tuple[float, ...]]:
    return frame.select(pl.col(columns).cast(pl.Float64).round(4)).rows()


Extract = Callable[..., Extraction]


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


# The made-up set: what is measured and done.


def charted(hour: str, itemid: int, value: object, **changes: object) -> Rows:
    row = {"stay_id": 1001, "charttime": f"2180-05-01 {hour}:00", "itemid": itemid, "value": value}
    return {"icu/chartevents": [row | changes]}


def drawn(hour: str, itemid: int, value: object, **changes: object) -> Rows:
    row = {"subject_id": 1, "charttime": f"2180-05-01 {hour}:00", "itemid": itemid, "value": value}
    return {"hosp/labevents": [row | changes]}


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


def order(table: str, start: str, end: str, itemid: int, **changes: object) -> Rows:
    row = {
        "stay_id": 1001,
        "starttime": f"2180-05-01 {start}:00",
        "endtime": f"2180-05-01 {end}:00",
        "itemid": itemid,
        "statusdescription": "FinishedRunning",
        "linkorderid": 1,
    }
    return {f"icu/{table}": [row | changes]}


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
