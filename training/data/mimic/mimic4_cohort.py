"""The stays of MIMIC-IV and their labels, by the rules of the MIMIC-III benchmark."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from training.data.csv_table import require
from training.data.extraction import Cohort, Step, exact_death, split_by_subject
from training.data.mimic.times import hours_after, timed_table
from training.data.phenotypes import phenotypes
from training.data.sources import Tally

MIN_AGE = 18
OLDEST_AGE = 90  # above 89 every age is given as 91

_ID = pl.Int32
# The unit of both medical and surgical patients, and those of neurology, are "other".
_UNIT_TYPES = {
    "Cardiac Vascular Intensive Care Unit (CVICU)": "cardiac_surgery",
    "Coronary Care Unit (CCU)": "coronary",
    "Medical Intensive Care Unit (MICU)": "medical",
    "Neuro Surgical Intensive Care Unit (Neuro SICU)": "surgical",
    "Surgical Intensive Care Unit (SICU)": "surgical",
    "Trauma SICU (TSICU)": "surgical",
}
_STAYS = {
    "subject_id": _ID,
    "hadm_id": _ID,
    "stay_id": _ID,
    "first_careunit": pl.String,
    "last_careunit": pl.String,
    "intime": pl.String,
    "outtime": pl.String,
}
_ADMISSIONS = {"hadm_id": _ID, "deathtime": pl.String, "hospital_expire_flag": pl.Int8}
_PATIENTS = {
    "subject_id": _ID,
    "gender": pl.String,
    "anchor_age": pl.Int32,
    "anchor_year": pl.Int32,
    "dod": pl.String,
}
_DIAGNOSES = {"hadm_id": _ID, "icd_code": pl.String, "icd_version": pl.Int32}


def read_cohort(source: Path, tally: Tally) -> Cohort:
    """The stays in the order of their ids.

    Private columns: `_subject_id`, `_stay_id`, `_intime`. Raises SourceError if a table is missing
    or malformed.
    """
    table = require(
        source / "icu", "icustays", _STAYS, required=("subject_id", "stay_id", "intime")
    )
    stays = timed_table(table, "icustays", tally, times=("intime", "outtime"))
    hosp = source / "hosp"
    table = require(hosp, "admissions", _ADMISSIONS, required=("hadm_id",))
    admissions = timed_table(table, "admissions", tally, times=("deathtime",))
    table = require(hosp, "patients", _PATIENTS, required=("subject_id",))
    patients = timed_table(table, "patients", tally, dates=("dod",))
    steps = [_step("all ICU stays", stays)]

    def keep(rule: str, kept: pl.DataFrame) -> pl.DataFrame:
        steps.append(_step(rule, kept))
        return kept

    stays = keep(
        "first and last care unit are the same",
        stays.filter(pl.col("first_careunit") == pl.col("last_careunit")),
    )
    stays = keep(
        "admission and patient are known",
        stays.join(admissions, on="hadm_id").join(patients, on="subject_id"),
    )
    stays = keep(
        "the only such ICU stay of its admission", stays.filter(pl.len().over("hadm_id") == 1)
    )
    age = pl.col("anchor_age") + pl.col("intime").dt.year() - pl.col("anchor_year")
    stays = stays.with_columns(
        age_years=pl.min_horizontal(age, pl.lit(OLDEST_AGE)).cast(pl.Float64)
    )
    stays = keep("18 years or older", stays.filter(pl.col("age_years") >= MIN_AGE))

    stays = _outcomes(stays, tally)
    dead_before = (pl.col("death_hours_high") <= 0).fill_null(False)
    stays = keep("alive at ICU admission", stays.filter(~dead_before))
    stays = keep("ends after it starts", stays.filter(pl.col("end_hours") > 0))

    stays = stays.join(_phenotypes(hosp), on="hadm_id", how="left").select(
        pl.col("stay_id").cast(pl.String).alias("episode_id"),
        pl.col("subject_id").cast(pl.String),
        split_by_subject("mimic4", stays["subject_id"].cast(pl.String)),
        pl.lit(None, pl.String).alias("benchmark_split"),
        pl.max_horizontal(pl.col("end_hours").ceil(), 1).cast(pl.Int32).alias("n_hours"),
        "age_years",
        sex=pl.col("gender").replace_strict({"F": "female", "M": "male"}, default=None),
        unit_type=pl.col("first_careunit").replace_strict(_UNIT_TYPES, default="other"),
        height_cm=pl.lit(None, pl.Float64),
        weight_kg=pl.lit(None, pl.Float64),
        mortality="mortality",
        los_hours="end_hours",
        death_hours_low="death_hours_low",
        death_hours_high="death_hours_high",
        phenotypes="phenotypes",
        end_hours="end_hours",
        _subject_id="subject_id",
        _stay_id="stay_id",
        _intime="intime",
    )
    return Cohort(stays.sort("episode_id"), tuple(steps))


def _step(rule: str, stays: pl.DataFrame) -> Step:
    return Step(rule, len(stays), stays["subject_id"].n_unique())


def _outcomes(stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """`mortality`, when death was, and when the record ends.

    A death in hospital without a time lies on the day of `dod`, if that is known.
    """
    flagged = pl.col("hospital_expire_flag") == 1
    timed = pl.col("deathtime").is_not_null()
    for reason, odd in (
        ("death-without-flag:admissions", timed & ~flagged),
        ("death-without-time:admissions", flagged & ~timed),
    ):
        if n := stays.select(odd.sum()).item():
            tally.repaired[reason] += n
    death = hours_after("deathtime", "intime")
    low, high = exact_death(death)
    day = pl.col("dod").dt.truncate("1d")
    midnight = pl.when(flagged & ~timed).then((day - pl.col("intime")).dt.total_seconds() / 3600)
    return stays.with_columns(
        mortality=(flagged | timed).fill_null(False),
        death_hours_low=pl.coalesce(low, midnight),
        death_hours_high=pl.coalesce(high, midnight + 24),
        end_hours=pl.min_horizontal(hours_after("outtime", "intime"), death),
    )


def _phenotypes(hosp: Path) -> pl.DataFrame:
    """`hadm_id` and `phenotypes` of each coded admission."""
    diagnoses = require(hosp, "diagnoses_icd", _DIAGNOSES, required=("hadm_id",)).read()
    return phenotypes(diagnoses.rename({"hadm_id": "stay"})).rename({"stay": "hadm_id"})
