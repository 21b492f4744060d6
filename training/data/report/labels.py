"""How many label instances a store gives, from its stays and the times of first observations.

The sample times are those of the MIMIC-III benchmark (Harutyunyan et al. 2019): whole hours after
admission after the first four, later than the first observation, up to the end of the stay. Times
and labels are those of `training.labels`, here as columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from training.labels import DECOMPENSATION_HORIZON_HOURS, MIN_HISTORY_HOURS

MORTALITY_HOUR = 48
LOS_DAYS = (1, 2, 3, 4, 5, 6, 7, 8, 14)
LOS_BUCKETS = ("<1", "1-2", "2-3", "3-4", "4-5", "5-6", "6-7", "7-8", "8-14", "14+")
COUNTS = (
    "mortality_stays",
    "mortality_positive",
    "decompensation_positive",
    "decompensation_negative",
    "decompensation_uncertain",
    "remaining_los_hours",
    "phenotyping_stays",
)
_STAYS_AT_ONCE = 4096  # some hundred thousand sample times


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelCounts:
    """Label instances of a store."""

    instances: pl.DataFrame  # group, then COUNTS
    by_hour: pl.DataFrame  # hour, stays, positive, negative (decompensation)
    remaining_days: dict[str, int]  # sample times by days left


def count_labels(stays: pl.DataFrame, group: str) -> LabelCounts:
    """Count the instances of each task, by values of the column `group`.

    `stays`: rows of `episodes.parquet` with `first_hours` (null: nothing was observed).
    """
    groups = stays.select(group=pl.col(group)).unique(maintain_order=True)
    by_stay = _stay_instances(stays.with_columns(group=pl.col(group)))
    hourly, by_hour, remaining = [], [], []
    for start in range(0, max(len(stays), 1), _STAYS_AT_ONCE):
        hours = sample_hours(stays.slice(start, _STAYS_AT_ONCE).with_columns(group=pl.col(group)))
        positive, negative = pl.col("decompensation") == 1, pl.col("decompensation") == 0
        known = pl.col("decompensation").is_not_null()
        hourly.append(
            hours.group_by("group").agg(
                decompensation_positive=positive.sum(),
                decompensation_negative=negative.sum(),
                decompensation_uncertain=(known & ~positive & ~negative).sum(),
                remaining_los_hours=pl.col("remaining_los").count(),
            )
        )
        by_hour.append(
            hours.filter(known)
            .group_by("hour")
            .agg(stays=pl.len(), positive=positive.sum(), negative=negative.sum())
        )
        remaining.append(
            hours.drop_nulls("remaining_los").group_by(days=los_bucket("remaining_los")).len("n")
        )
    hourly_counts = pl.concat(hourly).group_by("group").sum()
    days = dict(pl.concat(remaining).group_by("days").sum().iter_rows())
    instances = (
        groups.join(by_stay, on="group", how="left", nulls_equal=True)
        .join(hourly_counts, on="group", how="left", nulls_equal=True)
        .with_columns(pl.col(COUNTS).fill_null(0).cast(pl.Int64))
        .select("group", *COUNTS)
        .sort("group", nulls_last=True)
    )
    return LabelCounts(
        instances=instances,
        by_hour=pl.concat(by_hour).group_by("hour").sum().sort("hour"),
        remaining_days={bucket: days.get(bucket, 0) for bucket in LOS_BUCKETS},
    )


def sample_hours(stays: pl.DataFrame) -> pl.DataFrame:
    """One row for each sample time of each stay, with its labels.

    Adds to the columns of `stays`: hour (the sample time), decompensation (probability of death
    within 24 hours; null: unknown) and remaining_los (hours; null: unknown). A stay ends with its
    length of stay, its record or its death, whichever comes first.
    """
    seen = pl.max_horizontal("first_hours", pl.lit(MIN_HISTORY_HOURS))
    first = seen.floor().cast(pl.Int64) + 1
    last = pl.min_horizontal(pl.col("los_hours").floor().cast(pl.Int64), "n_hours")
    low, high = pl.col("death_hours_low"), pl.col("death_hours_high")
    hour = pl.col("hour").cast(pl.Float64)
    died = (hour + DECOMPENSATION_HORIZON_HOURS - low) / (high - low)
    return (
        stays.drop_nulls("first_hours")
        .with_columns(_first=first, _last=last)
        .filter(pl.col("_first") <= pl.col("_last"))
        .with_columns(hour=pl.int_ranges("_first", pl.col("_last") + 1))
        .drop("_first", "_last")
        .explode("hour")
        .filter(high.is_null() | (hour < high))
        .with_columns(
            # Float32 decides what is certain, as it does in training.
            decompensation=pl.when(~pl.col("mortality"))
            .then(0.0)
            .when(pl.col("mortality"))
            .then(died.clip(0, 1))
            .cast(pl.Float32),
            remaining_los=pl.col("los_hours") - hour,
        )
    )


def los_bucket(hours: str) -> pl.Expr:
    """The bucket of a number of hours, in days; lower ends belong to their bucket."""
    bucket = pl.sum_horizontal(pl.col(hours) >= 24 * days for days in LOS_DAYS)
    return bucket.replace_strict(dict(enumerate(LOS_BUCKETS)), return_dtype=pl.String)


def _stay_instances(stays: pl.DataFrame) -> pl.DataFrame:
    """Instances of the tasks that label a stay once."""
    length = pl.col("los_hours").fill_null(pl.col("n_hours"))
    in_task = (
        pl.col("mortality").is_not_null()
        & (length >= MORTALITY_HOUR)
        & (pl.col("first_hours") <= MORTALITY_HOUR)
    )
    return stays.group_by("group").agg(
        mortality_stays=in_task.sum(),
        mortality_positive=(in_task & pl.col("mortality")).sum(),
        phenotyping_stays=pl.col("phenotypes").is_not_null().sum(),
    )


def phenotype_counts(stays: pl.DataFrame) -> dict[str, Any]:
    """Number of stays with each phenotype, among those whose phenotypes are known."""
    named = stays.select(pl.col("phenotypes").explode()).drop_nulls()
    return dict(named.group_by("phenotypes").len().iter_rows())
