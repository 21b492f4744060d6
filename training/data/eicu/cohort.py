"""Which unit stays of eICU are episodes, and their static facts and labels."""

from __future__ import annotations

import polars as pl

from training.data.eicu.files import KEY
from training.data.extraction import Cohort, Step, exact_death, split_by_subject
from training.data.phenotypes import phenotypes
from training.data.sources import Tally

ADULT_YEARS = 18.0
OLDEST_YEARS = 90.0
"""Stands for "> 89"."""
SHORTEST_MINUTES = 60
PUBLISHED_ROWS = 200_859

HEIGHT_CM = (100.0, 250.0)
WEIGHT_KG = (20.0, 400.0)

_SEX = {"Male": "male", "Female": "female"}
# CCU-CTICU holds coronary and cardiothoracic patients, Med-Surg ICU medical and surgical ones.
_UNIT_TYPE = {
    "Cardiac ICU": "coronary",
    "CSICU": "cardiac_surgery",
    "CTICU": "cardiac_surgery",
    "MICU": "medical",
    "SICU": "surgical",
}
_ICD9 = r"^([0-9]{3}(\.[0-9]{1,2})?|V[0-9]{2}(\.[0-9]{1,2})?|E[0-9]{3}(\.[0-9])?)$"
_ICD10 = r"^[A-Z][0-9][0-9A-Z](\.[0-9A-Z]{1,4})?$"


def with_age(patients: pl.DataFrame) -> pl.DataFrame:
    """The rows of patient with `age_years`: "> 89" is 90, an empty age is null."""
    age = pl.col("age").str.strip_chars()
    return patients.with_columns(
        age_years=pl.when(age.str.starts_with(">"))
        .then(OLDEST_YEARS)
        .otherwise(age.cast(pl.Float64, strict=False))
    )


def step(rule: str, stays: pl.DataFrame, published: int | None = None) -> Step:
    """A rule, and what it left."""
    return Step(rule, len(stays), stays["uniquepid"].n_unique(), published)


def strict_stays(patients: pl.DataFrame) -> tuple[pl.DataFrame, tuple[Step, ...]]:
    """Adults' unit stays of an hour or more that are the only such one of their hospital stay.

    The order of the hospital stays of a patient is not known, but within one of them there is no
    order to know: a patient keeps all hospital stays that have one unit stay. A record of less than
    an hour is no stay, so it does not count as a second one.
    """
    steps = [step("all unit stays", patients, PUBLISHED_ROWS)]
    stays = patients.filter(pl.col("age_years") >= ADULT_YEARS)
    steps.append(step("age 18 or more", stays))
    stays = stays.filter(pl.col("unitdischargeoffset").is_not_null())
    steps.append(step("unit discharge known", stays))
    stays = stays.filter(pl.col("unitdischargeoffset") >= SHORTEST_MINUTES)
    steps.append(step("at least 1 hour", stays))
    stays = stays.filter(pl.len().over("patienthealthsystemstayid") == 1)
    steps.append(step("the only unit stay of its hospital stay", stays))
    return stays, tuple(steps)


def described(
    stays: pl.DataFrame,
    steps: tuple[Step, ...],
    diagnoses: pl.DataFrame | None,
    tally: Tally,
    *,
    benchmark: bool,
) -> Cohort:
    """The cohort of the chosen rows of patient, with labels from them and from diagnosis."""
    end = pl.col("unitdischargeoffset") / 60
    stays = _with_outcome(stays, tally, benchmark=benchmark).with_columns(
        pl.col(KEY).cast(pl.String).alias("episode_id"),
        pl.col("uniquepid").alias("subject_id"),
        split_by_subject("eicu", stays["uniquepid"]),
        pl.lit(None, pl.String).alias("benchmark_split"),
        end.ceil().clip(1, None).cast(pl.Int16).alias("n_hours"),
        pl.col("gender").replace_strict(_SEX, default=None, return_dtype=pl.String).alias("sex"),
        pl.when(pl.col("unittype").is_not_null())
        .then(pl.col("unittype").replace_strict(_UNIT_TYPE, default="other"))
        .alias("unit_type"),
        _within("admissionheight", *HEIGHT_CM).alias("height_cm"),
        _within("admissionweight", *WEIGHT_KG).alias("weight_kg"),
        end.alias("los_hours"),
        end.alias("end_hours"),
    )
    for name, column in (("height", "height_cm"), ("weight", "weight_kg")):
        lost = stays[f"admission{name}"].count() - stays[column].count()
        if lost:
            tally.refused[f"outside-limits:{name}"] += lost
    if diagnoses is None:
        stays = stays.with_columns(phenotypes=pl.lit(None, pl.List(pl.String)))
    else:
        labels = _phenotypes(diagnoses.join(stays, on=KEY, how="semi"), tally, benchmark=benchmark)
        stays = stays.join(labels, on=KEY, how="left")
    return Cohort(
        stays.select(
            *("episode_id", "subject_id", "split", "benchmark_split", "n_hours", "age_years"),
            *("sex", "unit_type", "height_cm", "weight_kg", "mortality", "los_hours"),
            *("death_hours_low", "death_hours_high", "phenotypes", "end_hours"),
            pl.col(KEY).alias("_id"),
        ).sort("episode_id"),
        steps,
    )


def _with_outcome(stays: pl.DataFrame, tally: Tally, *, benchmark: bool) -> pl.DataFrame:
    """The stays with `mortality`, `death_hours_low` and `death_hours_high`."""
    hospital = pl.col("hospitaldischargestatus")
    unit_death = (pl.col("unitdischargestatus") == "Expired").fill_null(value=False)
    contradicting = unit_death & (hospital == "Alive")
    mortality: pl.Expr = (
        pl.when(hospital == "Expired").then(True).when(hospital == "Alive").then(False)
    )
    if not benchmark:
        if n := stays.filter(contradicting).height:
            tally.refused["contradictory-outcome:mortality"] += n
        # Death in the unit is death in hospital; alive after it is one error or the other.
        mortality = (
            pl.when(contradicting).then(None).when(unit_death).then(True).otherwise(mortality)
        )
    stays = stays.with_columns(mortality=mortality)
    # A patient who left the unit alive did not die before leaving it.
    unit, end = pl.col("unitdischargeoffset"), pl.col("hospitaldischargeoffset")
    if n := stays.filter(pl.col("mortality") & ~unit_death & (end < unit)).height:
        tally.repaired["before-unit-discharge:death"] += n
    death = pl.when(unit_death).then(unit).when(end >= unit).then(end).when(end < unit).then(unit)
    return stays.with_columns(*exact_death(pl.when(pl.col("mortality")).then(death / 60)))


def _within(column: str, low: float, high: float) -> pl.Expr:
    return pl.when(pl.col(column).is_between(low, high)).then(pl.col(column))


def _phenotypes(diagnoses: pl.DataFrame, tally: Tally, *, benchmark: bool) -> pl.DataFrame:
    """KEY and `phenotypes` of each coded stay.

    A row of diagnosis has ICD-9 and ICD-10 codes in one text: "414.00, I25.10". Its first ICD-9
    code counts, or the first ICD-10 code of a row that has no other. The benchmark takes what
    stands before the first comma, of diagnoses entered after admission, and has no label for a stay
    without any of the 25.
    """
    diagnoses = diagnoses.drop_nulls("icd9code")
    codes = pl.col("icd9code").str.split(",").list.eval(pl.element().str.strip_chars())
    if benchmark:
        chosen = diagnoses.filter(pl.col("diagnosisoffset") > 0).select(
            stay=KEY, icd_version=pl.lit(9), icd_code=codes.list.first()
        )
        found = phenotypes(chosen).filter(pl.col("phenotypes").list.len() > 0)
        return found.rename({"stay": KEY})

    def first(form: str) -> pl.Expr:
        return codes.list.eval(pl.element().filter(pl.element().str.contains(form))).list.first()

    chosen = diagnoses.select(stay=KEY, nine=first(_ICD9), ten=first(_ICD10)).with_columns(
        icd_version=pl.when(pl.col("nine").is_null()).then(10).otherwise(9),
        icd_code=pl.coalesce("nine", "ten"),
    )
    unknown = chosen["icd_code"].null_count()
    only_ten = chosen.filter(pl.col("icd_version") == 10).height - unknown
    if unknown:
        tally.refused["unknown-code:diagnosis"] += unknown
    if only_ten:
        tally.repaired["icd-10-only:diagnosis"] += only_ten
    return phenotypes(chosen.drop_nulls("icd_code")).rename({"stay": KEY})
