"""One pass over the items of an episode store: the counts that its report and gates are made of.

A store is read row group by row group. Each holds whole stays, so what is counted in one block adds
up over blocks, and memory holds one block (512 stays by default) and the counts so far, however
large the store is. Quantiles come from counts of values rounded to a few significant digits: a
heart rate or a pH is met as it was charted, and nothing grows with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from llm4ehr.variables import VARIABLES

_VALUE_DIGITS = 4  # of hourly values
_EVENT_DIGITS = 3  # of event values: there are thousands of codes
_CELL = ("episode_id", "variable", "hour")
_HOURS_OF_A_YEAR = 365.25 * 24

HISTOGRAM_BINS = 40
_STEPS = (1.0, 0.1, 0.05, 0.01)  # in which values are charted
_CHARTED_SO = 0.95  # share of the values that are multiples of such a step
_ROBUST = (0.001, 0.999)  # shares of the hourly values that a histogram leaves out on either side

FAULTS = ("before-birth", "known-before-true", "before-admission", "after-end")
"""What may be wrong with the time of an item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """Counts of a whole store. "Hours" are hour bins of stays in which a variable was observed."""

    variables: pl.DataFrame
    """variable, n (values), stays, hours, charted_hours (the same by the time of the values, known
    or not), sum and squares of (hourly value - normal value), implausible (values outside the
    plausible limits)"""
    values: pl.DataFrame  # variable, value (hourly, rounded), n
    delays: pl.DataFrame  # item (a variable, or "event"), minutes until known, n
    codes: pl.DataFrame  # code, n, stays, valued (events with a value)
    code_values: pl.DataFrame  # code, value (rounded), n
    faults: pl.DataFrame  # fault, item, subject_id, n
    first_hours: pl.DataFrame  # episode_id, first_hours (when the first observation was known)


class _Counts:
    """Blocks of counts, added up by key."""

    def __init__(self, *keys: str) -> None:
        self._keys = keys
        self._sum: pl.DataFrame | None = None

    def add(self, block: pl.DataFrame) -> None:
        parts = [block] if self._sum is None else [self._sum, block]
        self._sum = pl.concat(parts).group_by(self._keys).sum()

    @property
    def frame(self) -> pl.DataFrame:
        """The counts so far, in the order of their keys."""
        assert self._sum is not None
        return self._sum.sort(self._keys)


def scan_store(store: Path) -> Scanned:
    """Count the items of a store, one row group at a time."""
    variables, values = _Counts("variable"), _Counts("variable", "value")
    codes, code_values = _Counts("code"), _Counts("code", "value")
    delays, faults = _Counts("item", "minutes"), _Counts("fault", "item", "subject_id")
    first_hours = []
    with (
        pq.ParquetFile(store / "episodes.parquet") as episode_file,
        pq.ParquetFile(store / "observations.parquet") as observation_file,
        pq.ParquetFile(store / "events.parquet") as event_file,
    ):
        # A store without a stay has no row group, but its counts have their columns all the same.
        for k in range(max(episode_file.metadata.num_row_groups, 1)):
            stays = _block(episode_file, k).select(
                "episode_id", "subject_id", "n_hours", "age_years"
            )
            observations = _items(_block(observation_file, k), stays, "variable")
            events = _items(_block(event_file, k), stays, "code")
            seen = current(observations)
            hourly = hourly_values(seen)

            variables.add(_variable_counts(observations, hourly))
            values.add(_value_counts(hourly, "variable", _VALUE_DIGITS))
            codes.add(_code_counts(events))
            code_values.add(_value_counts(events, "code", _EVENT_DIGITS))
            for items in (
                observations.with_columns(item="variable"),
                events.with_columns(item=pl.lit("event")),
            ):
                delays.add(_delays(items))
                faults.add(_faults(items))
            first_hours.append(
                seen.filter(pl.col("at") >= 0).group_by("episode_id").agg(first_hours=pl.min("at"))
            )
    return Scanned(
        variables=variables.frame,
        values=values.frame,
        delays=delays.frame,
        codes=codes.frame,
        code_values=code_values.frame,
        faults=faults.frame,
        first_hours=pl.concat(first_hours),
    )


def current(observations: pl.DataFrame) -> pl.DataFrame:
    """The observations that were not history when they became known.

    The same rule as `llm4ehr.store_tables.records_from_tables`: of one stay, variable and priority,
    in the order in which they became known, those whose time is not before the latest time of one
    that was known by then.
    """
    kind = ("episode_id", "variable", "priority")
    return (
        observations.sort("at", "hours")
        .with_columns(latest=pl.col("hours").cum_max().over(kind))
        .filter(pl.col("hours") == pl.col("latest").max().over(*kind, "at"))
        .drop("latest")
    )


def hourly_values(observations: pl.DataFrame) -> pl.DataFrame:
    """One value for each stay, variable and hour of the record, the one that a model would see.

    `observations` are those that were current when they became known.
    The same rule as `llm4ehr.episode.hourly_grid`: hour t is [t, t + 1), and in it the best
    priority goes first, then the latest value; values of one time give their median.
    """
    best = pl.col("priority") == pl.col("priority").min().over(_CELL)
    latest = pl.col("at") == pl.col("at").max().over(_CELL)
    return (
        observations.filter(pl.col("at") >= 0, pl.col("at") < pl.col("n_hours"))
        .with_columns(hour=pl.col("at").floor().cast(pl.Int32))
        .filter(best)
        .filter(latest)
        .group_by(_CELL)
        .agg(pl.col("value").median())
    )


def quantiles(counts: pl.DataFrame, value: str, shares: Sequence[float]) -> list[float | None]:
    """The smallest values that at least these shares of the rows do not exceed.

    `counts` has the columns `value` and n. Without rows every quantile is None.
    """
    if counts.is_empty():
        return [None] * len(shares)
    ordered = counts.sort(value)
    reached = ordered["n"].cum_sum()
    rows = [reached.search_sorted(share * reached[-1], side="left") for share in shares]
    return [float(ordered[value][min(row, len(ordered) - 1)]) for row in rows]


def histogram(counts: pl.DataFrame) -> dict[str, Any] | None:
    """Hourly values in at most 40 bins between robust limits.

    Bins are whole multiples of the step in which values were charted, and the last one ends with
    the highest value. Otherwise some bins would hold four whole numbers and others three, and the
    picture would have teeth that the data lack.
    """
    low, high = quantiles(counts, "value", _ROBUST)
    if low is None or high is None:
        return None
    total = int(counts["n"].sum())
    step = next((s for s in _STEPS if _multiples(counts, s) >= _CHARTED_SO * total), _STEPS[-1])
    span = high - low + step
    width = next(
        m * 10.0**k
        for k in range(-4, 6)
        for m in (1, 2, 3, 4, 5)
        if m * 10.0**k * HISTOGRAM_BINS >= span - 1e-9 and _is_multiple(m * 10.0**k, step)
    )
    n_bins = math.ceil(span / width - 1e-9)
    start = round(math.ceil(high / step - 1e-6) * step + step / 2 - n_bins * width, 6)
    bin_of = ((pl.col("value") - start) / width).floor().cast(pl.Int64).alias("bin")
    by_bin = dict(counts.group_by(bin_of).agg(pl.sum("n")).iter_rows())
    inside = [by_bin.get(k, 0) for k in range(n_bins)]
    below = sum(n for k, n in by_bin.items() if k < 0)
    return {
        "start": start,
        "width": round(width, 6),
        "counts": inside,
        "below": below,
        "above": total - below - sum(inside),
    }


def _is_multiple(width: float, step: float) -> bool:
    return width >= step and abs(width / step - round(width / step)) < 1e-6


def _multiples(counts: pl.DataFrame, step: float) -> int:
    steps = pl.col("value") / step
    return int(counts.filter((steps - steps.round()).abs() < 1e-6)["n"].sum())


def _block(file: pq.ParquetFile, k: int) -> pl.DataFrame:
    inside = k < file.metadata.num_row_groups
    block = pl.from_arrow(file.read_row_group(k) if inside else file.schema_arrow.empty_table())
    assert isinstance(block, pl.DataFrame)
    return block


def _items(items: pl.DataFrame, stays: pl.DataFrame, term: str) -> pl.DataFrame:
    """Items with the columns of their stay, and `at`: when they were both true and known."""
    return (
        items.with_columns(pl.col("episode_id", term).cast(pl.String))
        .with_columns(at=pl.max_horizontal("hours", "available_hours"))
        .join(stays, on="episode_id", how="left")
    )


def _variable_counts(observations: pl.DataFrame, hourly: pl.DataFrame) -> pl.DataFrame:
    limits = pl.DataFrame(
        [(v.name, v.normal, v.plausible_low, v.plausible_high) for v in VARIABLES],
        schema=["variable", "normal", "low", "high"],
        orient="row",
    )
    implausible = ~pl.col("value").is_between(pl.col("low"), pl.col("high"))
    # Squares of the distance to the normal value lose no digits where the mean is far from zero.
    distance = pl.col("value") - pl.col("normal")
    by_value = (
        observations.join(limits, on="variable")
        .group_by("variable")
        .agg(n=pl.len(), stays=pl.n_unique("episode_id"), implausible=implausible.sum())
    )
    by_charted_hour = (
        observations.filter(pl.col("hours") >= 0, pl.col("hours") < pl.col("n_hours"))
        .select("episode_id", "variable", pl.col("hours").floor())
        .unique()
        .group_by("variable")
        .agg(charted_hours=pl.len())
    )
    by_hour = (
        hourly.join(limits, on="variable")
        .group_by("variable")
        .agg(hours=pl.len(), sum=distance.sum(), squares=(distance**2).sum())
    )
    counted = by_value.join(by_hour, on="variable", how="left")
    counted = counted.join(by_charted_hour, on="variable", how="left").fill_null(0)
    whole = ("n", "stays", "implausible", "hours", "charted_hours")
    return counted.with_columns(pl.col(whole).cast(pl.Int64))


def _value_counts(items: pl.DataFrame, term: str, digits: int) -> pl.DataFrame:
    rounded = pl.col("value").round_sig_figs(digits)
    return (
        items.drop_nulls("value")
        .group_by(term, value=rounded)
        .agg(n=pl.len().cast(pl.Int64))
    )  # fmt: skip


def _code_counts(events: pl.DataFrame) -> pl.DataFrame:
    counted = events.group_by("code").agg(
        n=pl.len(), stays=pl.n_unique("episode_id"), valued=pl.col("value").is_not_null().sum()
    )
    return counted.with_columns(pl.col("n", "stays", "valued").cast(pl.Int64))


def _delays(items: pl.DataFrame) -> pl.DataFrame:
    minutes = ((pl.col("available_hours") - pl.col("hours")) * 60).round().cast(pl.Int64)
    return (
        items.drop_nulls("available_hours")
        .group_by("item", minutes=minutes)
        .agg(n=pl.len().cast(pl.Int64))
    )


def _faults(items: pl.DataFrame) -> pl.DataFrame:
    wrong = {
        "before-birth": pl.col("age_years") * _HOURS_OF_A_YEAR + pl.col("hours") < 0,
        "known-before-true": pl.col("available_hours") < pl.col("hours"),
        "before-admission": pl.col("hours") < 0,
        "after-end": pl.col("at") > pl.col("n_hours"),
    }
    return pl.concat(
        items.filter(wrong[fault])
        .group_by(fault=pl.lit(fault), item="item", subject_id="subject_id")
        .agg(n=pl.len().cast(pl.Int64))
        for fault in FAULTS
    )
