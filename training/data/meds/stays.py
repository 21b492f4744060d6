"""ICU stays and their labels from the coded events of each subject of a MEDS data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from training.data.extraction import Cohort, Step, exact_death, split_by_subject
from training.data.meds.code_map import StayCodes, fits, star
from training.data.phenotypes import phenotypes
from training.data.sources import Tally

SPLITS = {"train": "pretrain", "tuning": "finetune", "held_out": "test"}
"""Split of MEDS -> split of ours. Subjects of any other are for testing: it may be held out too."""

MAX_HOURS = 32_767.0  # as many as the store counts: 3.7 years
DAYS_PER_YEAR = 365.2425
_OF = "subject_id"


def find_stays(
    rows: pl.DataFrame, codes: StayCodes, splits: pl.DataFrame | None, tally: Tally
) -> Cohort:
    """The cohort of `rows`: subject_id, time, code and value of all codes that `codes` names.

    `splits`: subject_id and split of the data set, if it has any.
    """

    def of(patterns: Sequence[str]) -> pl.DataFrame:
        return rows.filter(fits(pl.col("code"), patterns))

    def timed(patterns: Sequence[str]) -> pl.DataFrame:
        return of(patterns).drop_nulls("time").sort(_OF, "time", "code")

    stays = timed(codes.admission).select(
        _OF,
        _admission="time",
        _unit=pl.col("code").str.extract("^(?s:.*?)//(.*)$"),
        _next=pl.col("time").shift(-1).over(_OF),
        _k=pl.int_range(1, pl.len() + 1).over(_OF),
    )
    steps = [_step("ICU admissions", stays)]
    stays = _first_after(stays, "_admission", timed(codes.discharge), "_discharge")
    stays = _first_after(stays, "_admission", timed(codes.record_end), "_record_end")
    before_next = [
        pl.when((pl.col(c) <= pl.col("_next")) | pl.col("_next").is_null()).then(c).alias(c)
        for c in ("_discharge", "_record_end")
    ]
    stays = stays.with_columns(before_next).with_columns(
        end_hours=hours_since_admission(pl.coalesce("_record_end", "_discharge")),
        los_hours=hours_since_admission(pl.col("_discharge")),
    )
    stays = stays.filter(pl.col("end_hours") > 0, pl.col("end_hours") <= MAX_HOURS)
    steps.append(_step("with an end before the next admission", stays))

    stays = _hospital_stay(stays, timed(codes.hospital_admission), timed(codes.hospital_discharge))
    stays = _with_death(stays, timed(codes.death), codes, tally)
    stays = _until_death(stays)
    stays = _with_statics(stays, of, codes)
    stays = _with_phenotypes(stays, timed([*codes.icd9, *codes.icd10]), codes)
    stays = _with_splits(stays, splits)
    subject = pl.col(_OF).cast(pl.String)
    stays = stays.with_columns(
        episode_id=pl.concat_str(subject, pl.lit("-"), pl.col("_k").cast(pl.String)),
        subject_id=subject,
        n_hours=pl.col("end_hours").ceil().clip(lower_bound=1).cast(pl.Int16),
    )
    drop = [c for c in stays.columns if c.startswith("_") and c != "_admission"]
    return Cohort(stays.drop(drop).sort("episode_id"), tuple(steps))


def hours_since_admission(time: pl.Expr) -> pl.Expr:
    """Hours from the admission to the ICU, in `_admission`."""
    return (time - pl.col("_admission")).dt.total_microseconds() / 3.6e9


def labelled_tasks(stays: pl.DataFrame) -> frozenset[str]:
    """The tasks that a cohort has any label of, as far as its source tells."""
    columns = {
        "mortality": "mortality",
        "decompensation": "death_hours_high",
        "remaining_los": "los_hours",
        "phenotyping": "phenotypes",
    }
    return frozenset(
        task for task, column in columns.items() if stays[column].null_count() < len(stays)
    )


def _step(rule: str, stays: pl.DataFrame) -> Step:
    return Step(rule, len(stays), stays[_OF].n_unique())


def _first_after(
    stays: pl.DataFrame, start: str, found: pl.DataFrame, name: str, *, exact: bool = False
) -> pl.DataFrame:
    """`stays` with the time of the first row of `found` after `start` (`exact`: or at it).

    `name`_code is the code of that row.
    """
    found = found.select(_OF, pl.col("time").alias(name), pl.col("code").alias(f"{name}_code"))
    return stays.sort(start).join_asof(
        found.sort(name),
        left_on=start,
        right_on=name,
        by=_OF,
        strategy="forward",
        allow_exact_matches=exact,
        coalesce=False,
        check_sortedness=False,
    )


def _hospital_stay(
    stays: pl.DataFrame, admissions: pl.DataFrame, discharges: pl.DataFrame
) -> pl.DataFrame:
    """`stays` with the begin of the hospital stay, its end, and the begin of the next one.

    Null: not known. Some sources know the day of a discharge only, and write midnight: so the first
    one from the day of ICU discharge on is taken, but none from before the admission to hospital.
    Nor one from after the next admission to hospital: that ends another stay.
    """
    moves = pl.concat(
        [
            discharges.select(_OF, "time", _in=pl.lit(value=False)),
            admissions.select(_OF, "time", _in=pl.lit(value=True)),
        ]
    ).sort("time", "_in")
    stays = (
        stays.sort("_admission")
        .join_asof(
            moves.rename({"time": "_hospital_admission"}),
            left_on="_admission",
            right_on="_hospital_admission",
            by=_OF,
            strategy="backward",
            coalesce=False,
            check_sortedness=False,
        )
        .with_columns(_hospital_admission=pl.when("_in").then("_hospital_admission"))
    )
    left = pl.coalesce("_discharge", "_record_end")
    stays = stays.with_columns(
        _left=left, _from=pl.max_horizontal(left.dt.truncate("1d"), "_hospital_admission")
    )
    stays = _first_after(stays, "_from", discharges, "_hospital_discharge", exact=True)
    # Looked for from the end of the ICU stay on: some sources have the admission to hospital, by
    # way of the emergency department, shortly after the one to the ICU.
    stays = _first_after(stays, "_left", admissions, "_next_hospital_admission", exact=True)
    other = pl.col("_hospital_discharge") > pl.col("_next_hospital_admission")
    return stays.with_columns(
        pl.when(~other.fill_null(value=False)).then(c).alias(c)
        for c in ("_hospital_discharge", "_hospital_discharge_code")
    )


def _with_death(
    stays: pl.DataFrame, deaths: pl.DataFrame, codes: StayCodes, tally: Tally
) -> pl.DataFrame:
    """`stays` with mortality and the interval of the time of death.

    A death after the next admission to hospital is none of this stay, whatever its discharge says.
    Where only the day of a death is known, a discharge that says how it ended counts for more.
    """
    stays = stays.with_columns(_day=pl.col("_admission").dt.truncate("1d"))
    stays = _first_after(stays, "_day", deaths, "_death", exact=True)
    later = pl.col("_death") >= pl.col("_next_hospital_admission")
    stays = stays.with_columns(_death=pl.when(~later.fill_null(value=False)).then("_death"))
    day_only = pl.col("_death").dt.time() == pl.time(0, 0)
    if not codes.midnight_is_a_day:
        day_only = pl.lit(value=False)
    died = fits(pl.col("_hospital_discharge_code"), codes.died).fill_null(value=False)
    left = pl.coalesce("_hospital_discharge", "_discharge")
    dead_by_then = pl.col("_death") <= left
    if codes.died:
        dead_by_then &= ~day_only | pl.col("_hospital_discharge").is_null()
    dead_by_then = dead_by_then.fill_null(value=False)
    stays = stays.with_columns(
        mortality=pl.when(died | dead_by_then)
        .then(True)
        .when(pl.col("_hospital_discharge").is_not_null())
        .then(False)
    )
    death = pl.when(pl.col("mortality")).then(hours_since_admission(pl.col("_death")))
    high = pl.when(day_only).then(death + 24).otherwise(exact_death(death)[1])
    impossible = high <= 0
    if n := stays.select(impossible.sum()).item():
        tally.refused["death-before-admission:stays"] += n
    low = pl.when(day_only).then(death.clip(lower_bound=0)).otherwise(death)
    return stays.with_columns(
        death_hours_low=pl.when(~impossible).then(low),
        death_hours_high=pl.when(~impossible).then(high),
        _exact=~day_only,
    )


def _until_death(stays: pl.DataFrame) -> pl.DataFrame:
    """`stays` whose record and length of stay end at a death whose time is known."""
    death = pl.when(pl.col("_exact") & (pl.col("death_hours_low") > 0)).then("death_hours_low")
    return stays.with_columns(
        end_hours=pl.min_horizontal("end_hours", death),
        los_hours=pl.when(pl.col("los_hours").is_not_null()).then(
            pl.min_horizontal("los_hours", death)
        ),
    )


def _with_statics(
    stays: pl.DataFrame, of: Callable[[Sequence[str]], pl.DataFrame], codes: StayCodes
) -> pl.DataFrame:
    """`stays` with age, sex, kind of unit, height and weight."""
    births = of(codes.birth).group_by(_OF).agg(_birth=pl.col("time").min())
    sexes = [
        of(getattr(codes, sex)).select(_OF, sex=pl.lit(sex)).unique() for sex in ("female", "male")
    ]
    sex = pl.concat(sexes).unique(_OF, keep="none")  # a subject coded as both is not known
    stays = stays.join(births, on=_OF, how="left").join(sex, on=_OF, how="left")
    age = (pl.col("_admission") - pl.col("_birth")).dt.total_microseconds()
    years = age / (DAYS_PER_YEAR * 24 * 3.6e9)
    unit_type = pl.coalesce(
        pl.lit(None, pl.String),
        *(
            pl.when(fits(pl.col("_unit"), [rule.name])).then(pl.lit(rule.unit_type))
            for rule in codes.unit_types
        ),
    )
    stays = stays.with_columns(
        age_years=pl.when(years.is_between(0, 130)).then(years), unit_type=unit_type
    )
    hours = hours_since_admission(pl.col("time"))
    for name in ("height_cm", "weight_kg"):
        charted = (
            of(getattr(codes, name))
            .filter(pl.col("value") > 0)
            .join(stays.select(_OF, "_k", "_admission", "_hospital_admission"), on=_OF)
            .filter(
                pl.col("time") >= pl.coalesce("_hospital_admission", "_admission"),
                hours <= 0,  # later ones are not known at admission
            )
            .sort("time", "value")
            .unique([_OF, "_k"], keep="first", maintain_order=True)
        )
        value = charted.select(_OF, "_k", pl.col("value").alias(name))
        stays = stays.join(value, on=[_OF, "_k"], how="left")
    return stays


def _with_phenotypes(
    stays: pl.DataFrame, diagnoses: pl.DataFrame, codes: StayCodes
) -> pl.DataFrame:
    """`stays` with the phenotypes of the diagnoses of their hospital stay."""
    code9, code10 = (star(pl.col("code"), patterns) for patterns in (codes.icd9, codes.icd10))
    begin = pl.coalesce("_hospital_admission", "_admission")
    end = pl.max_horizontal("_hospital_discharge", "_discharge", "_record_end")
    numbered = stays.with_row_index("stay")
    of_stay = diagnoses.join(numbered, on=_OF).filter(pl.col("time").is_between(begin, end))
    found = phenotypes(
        of_stay.select(
            "stay",
            icd_version=pl.when(code9.is_not_null()).then(9).otherwise(10),
            icd_code=pl.coalesce(code9, code10),
        )
    )
    return numbered.join(found, on="stay", how="left", maintain_order="left").drop("stay")


def _with_splits(stays: pl.DataFrame, splits: pl.DataFrame | None) -> pl.DataFrame:
    """`stays` with the split of the data set as `benchmark_split`, and ours.

    A subject of a split that we do not know is for testing; one that is in none has the split of
    its hash.
    """
    by_hash = split_by_subject("meds", stays[_OF].cast(pl.String))
    if splits is None:
        return stays.with_columns(by_hash, benchmark_split=pl.lit(None, pl.String))
    stays = stays.join(
        splits.rename({"split": "benchmark_split"}), on=_OF, how="left", maintain_order="left"
    )
    theirs = pl.col("benchmark_split")
    known = theirs.replace_strict(SPLITS, default="test", return_dtype=pl.String)
    return stays.with_columns(split=pl.when(theirs.is_null()).then(by_hash).otherwise(known))
