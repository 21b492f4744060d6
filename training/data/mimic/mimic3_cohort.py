"""The stays of MIMIC-III, their labels, and which rows of the event tables belong to them.

Rules and counts are those of the MIMIC-III benchmark (Harutyunyan et al. 2019).
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from training.data.csv_table import require
from training.data.extraction import Cohort, Step, exact_death, split_by_subject
from training.data.mimic.times import hours_after, timed_table
from training.data.phenotypes import phenotypes
from training.data.sources import Tally
from training.data.tables import load

MIN_AGE = 18
OLDEST_AGE = 90  # above 89 the date of birth is shifted by some 300 years

_UNIT_TYPES = {
    "CCU": "coronary",
    "CSRU": "cardiac_surgery",
    "MICU": "medical",
    "SICU": "surgical",
    "TSICU": "surgical",
}
_ID = pl.Int32
_STAY_COLUMNS = {
    "subject_id": _ID,
    "hadm_id": _ID,
    "icustay_id": _ID,
    "first_careunit": pl.String,
    "last_careunit": pl.String,
    "first_wardid": pl.Int32,
    "last_wardid": pl.Int32,
    "intime": pl.String,
    "outtime": pl.String,
    "los": pl.Float64,
}
_ADMISSION_COLUMNS = {
    "subject_id": _ID,
    "hadm_id": _ID,
    "admittime": pl.String,
    "dischtime": pl.String,
    "deathtime": pl.String,
}
_PATIENT_COLUMNS = {"subject_id": _ID, "gender": pl.String, "dob": pl.String, "dod": pl.String}


def read_cohort(source: Path, *, benchmark: bool, tally: Tally) -> Cohort:
    """The stays in the order of their ids, with their labels.

    Stays of one unit, without a transfer, the only such one of its admission, of an adult. Raises
    SourceError if a table is missing or malformed.
    """
    table = require(
        source, "ICUSTAYS", _STAY_COLUMNS, required=("subject_id", "hadm_id", "icustay_id")
    )
    admissions = require(source, "ADMISSIONS", _ADMISSION_COLUMNS, required=("hadm_id",))
    patients = require(source, "PATIENTS", _PATIENT_COLUMNS, required=("subject_id",))
    stays = timed_table(table, "ICUSTAYS", tally, times=("intime", "outtime"))
    steps = [_step("all ICU stays", stays, 61532)]

    def keep(rule: str, kept: pl.DataFrame, published: int | None = None) -> pl.DataFrame:
        steps.append(_step(rule, kept, published))
        return kept

    stays = keep(
        "first and last ward and care unit are the same",
        stays.filter(
            pl.col("first_wardid") == pl.col("last_wardid"),
            pl.col("first_careunit") == pl.col("last_careunit"),
        ),
        55830,
    )
    dates = timed_table(
        admissions, "ADMISSIONS", tally, times=("admittime", "dischtime", "deathtime")
    )
    people = timed_table(patients, "PATIENTS", tally, dates=("dob", "dod"))
    stays = keep(
        "admission and patient are known",
        stays.join(dates, on=["subject_id", "hadm_id"]).join(people, on="subject_id"),
    )
    stays = keep(
        "the only such ICU stay of its admission",
        stays.filter(pl.len().over("subject_id", "hadm_id") == 1),
        50186,
    )
    age = (pl.col("intime") - pl.col("dob")).dt.total_seconds() / 86400 / 365
    too_old = (age < 0) | (age > OLDEST_AGE - 1)
    stays = stays.with_columns(age_years=pl.when(too_old).then(float(OLDEST_AGE)).otherwise(age))
    stays = keep("18 years or older", stays.filter(pl.col("age_years") >= MIN_AGE), 42276)

    stays = _labels(stays, benchmark=benchmark)
    if benchmark:
        stays = keep("the length of stay is known", stays.drop_nulls("end_hours"))
    else:
        dead_before = (pl.col("death_hours_high") <= 0) | (
            pl.col("dod").dt.date() < pl.col("intime").dt.date()
        )
        stays = keep("alive at ICU admission", stays.filter(~dead_before.fill_null(False)))
        stays = keep("ends after it starts", stays.filter(pl.col("end_hours") > 0))
    coded = _phenotypes(source, benchmark=benchmark)
    stays = stays.join(coded, on="hadm_id", how="left").with_columns(
        episode_id=pl.col("icustay_id").cast(pl.String),
        _subject_id=pl.col("subject_id"),
        _hadm_id=pl.col("hadm_id"),
        _icustay_id=pl.col("icustay_id"),
        _intime=pl.col("intime"),
        subject_id=pl.col("subject_id").cast(pl.String),
    )
    subjects = stays["subject_id"]
    stays = stays.with_columns(split_by_subject("mimic3", subjects), _benchmark_split(subjects))
    columns = (
        "episode_id", "subject_id", "split", "benchmark_split", "n_hours", "age_years", "sex",
        "unit_type", "height_cm", "weight_kg", "mortality", "los_hours", "death_hours_low",
        "death_hours_high", "phenotypes", "end_hours", "_subject_id", "_hadm_id", "_icustay_id",
        "_intime",
    )  # fmt: skip
    return Cohort(stays.select(columns).sort("episode_id"), tuple(steps))


def _step(rule: str, stays: pl.DataFrame, published: int | None) -> Step:
    return Step(rule, len(stays), stays["subject_id"].n_unique(), published)


def _labels(stays: pl.DataFrame, *, benchmark: bool) -> pl.DataFrame:
    """Static facts, when the record ends, and the outcome.

    The benchmark compares the date of death, a midnight, with the times of admission and discharge,
    and lets a stay run on to OUTTIME after a death.
    """
    death, dod = pl.col("deathtime"), pl.col("dod")
    in_admission = death.is_between("admittime", "dischtime")
    if benchmark:
        died = in_admission | dod.is_between("admittime", "dischtime")
        hours = pl.when(died.fill_null(False)).then(hours_after("deathtime", "intime"))
        low, high = exact_death(hours)
        end = pl.col("los") * 24
    else:
        day = dod.dt.date()
        on_day = day.is_between(pl.col("admittime").dt.date(), pl.col("dischtime").dt.date())
        died = death.is_not_null() | on_day
        low, high = exact_death(hours_after("deathtime", "intime"))
        midnight = pl.when(on_day).then((dod - pl.col("intime")).dt.total_seconds() / 3600)
        low = pl.coalesce(low, midnight)
        high = pl.coalesce(high, midnight + 24)
        end = pl.min_horizontal(
            hours_after("outtime", "intime"), hours_after("deathtime", "intime")
        )
    return stays.with_columns(
        sex=pl.col("gender").replace_strict({"F": "female", "M": "male"}, default=None),
        unit_type=pl.col("first_careunit").replace_strict(_UNIT_TYPES, default="other"),
        height_cm=pl.lit(None, pl.Float64),
        weight_kg=pl.lit(None, pl.Float64),
        mortality=died.fill_null(False),
        end_hours=end,
        death_hours_low=low,
        death_hours_high=high,
    ).with_columns(
        n_hours=pl.max_horizontal(pl.col("end_hours").ceil(), 1).cast(pl.Int32),
        los_hours=pl.col("end_hours"),
    )


def _phenotypes(source: Path, *, benchmark: bool) -> pl.DataFrame:
    """Phenotypes of each coded admission: hadm_id and phenotypes."""
    columns = {"hadm_id": _ID, "icd9_code": pl.String}
    diagnoses = require(source, "DIAGNOSES_ICD", columns, required=("hadm_id",)).read()
    if benchmark:  # codes without an entry in the dictionary are no codes
        dictionary = require(source, "D_ICD_DIAGNOSES", {"icd9_code": pl.String}).read()
        diagnoses = diagnoses.join(dictionary, on="icd9_code", how="semi")
    return phenotypes(
        diagnoses.select(
            stay="hadm_id", icd_version=pl.lit(9), icd_code="icd9_code"
        )
    ).rename({"stay": "hadm_id"})  # fmt: skip


def _benchmark_split(subjects: pl.Series) -> pl.Series:
    """The published split of each subject; all who are not listed are in the training set."""
    listed = load("mimic3_splits")
    of = dict(zip(listed["subject_id"], listed["split"], strict=True))
    return subjects.replace_strict(of, default="train").alias("benchmark_split")


def rows_of_stays(rows: pl.DataFrame, cohort: Cohort, table: str, tally: Tally) -> pl.DataFrame:
    """The rows that belong to a stay, with its number `stay` and its start `_intime`.

    `rows` has subject_id, hadm_id and maybe icustay_id. A row of a patient of the cohort belongs to
    the stay of its admission, unless it names another ICU stay; the laboratory names none. Rows of
    other patients are passed over without being counted.
    """
    stays = cohort.stays.select(
        "_subject_id", "_hadm_id", "_icustay_id", "_intime", stay=pl.int_range(pl.len(), dtype=_ID)
    )
    rows = rows.join(stays, left_on="subject_id", right_on="_subject_id", how="semi")

    def refuse(bad: pl.Expr, reason: str, rows: pl.DataFrame) -> pl.DataFrame:
        kept = rows.filter(~bad)
        if len(kept) < len(rows):
            tally.refused[f"{reason}:{table}"] += len(rows) - len(kept)
        return kept

    rows = refuse(pl.col("hadm_id").is_null(), "hadm-empty", rows)
    rows = rows.join(
        stays,
        left_on=["subject_id", "hadm_id"],
        right_on=["_subject_id", "_hadm_id"],
        how="left",
        maintain_order="left",
    )
    rows = refuse(pl.col("stay").is_null(), "hadm-not-in-cohort", rows)
    if "icustay_id" not in rows.columns:
        return rows
    unnamed = rows["icustay_id"].null_count()
    if unnamed:
        tally.repaired[f"icustay-from-hadm:{table}"] += unnamed
    other = (pl.col("icustay_id") != pl.col("_icustay_id")).fill_null(False)
    return refuse(other, "icustay-other", rows)
