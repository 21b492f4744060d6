"""What is done to the items of every relational data set: repair, refuse, deduplicate, order."""

from __future__ import annotations

import hashlib

import polars as pl

from llm4ehr.variables import PREFERRED, VARIABLES
from training.data.extraction import Items
from training.data.sources import SourceError, Tally

OBSERVATION_COLUMNS = {
    "stay": pl.Int32,
    "variable": pl.String,
    "hours": pl.Float64,
    "available_hours": pl.Float64,
    "value": pl.Float64,
    "priority": pl.Int8,
}
EVENT_COLUMNS = {
    "stay": pl.Int32,
    "code": pl.String,
    "hours": pl.Float64,
    "available_hours": pl.Float64,
    "value": pl.Float64,
}
CODE_COLUMNS = {"code": pl.String, "descriptor": pl.String, "unit": pl.String}

MAX_CODE_CHARACTERS = 128

# Charted as 0 when a probe is off or a field was left alone, far more often than in an arrest.
ZERO_IS_MISSING = ("hr", "sbp", "dbp", "mbp", "rr", "spo2")

# The unit of a value that can be read off it: the ranges in the two units do not overlap.
_REPAIRS = {
    "percent:fio2": ("fio2", (21.0, 100.0), lambda v: v / 100),
    "fahrenheit:temp": ("temp", (70.0, 120.0), lambda v: (v - 32) * 5 / 9),
    "fraction:spo2": ("spo2", (1e-9, 1.0), lambda v: v * 100),
}
# Variables of which the service can tell a second-choice source by its code. For the others a
# preference would be one that training knows and the bedside does not.
_WITH_FALLBACK = [v.name for v in VARIABLES if v.loinc_fallback]
_INDEX = {v.name: i for i, v in enumerate(VARIABLES)}


def finish(items: Items, stays: pl.DataFrame, tally: Tally, *, limits: bool) -> Items:
    """The items that enter the store, in their order.

    `stays` tells where each record ends (`stay`, `end_hours`). With `limits`, units are repaired
    and values beyond the hard limits of a variable refused. Everything left out or mended is
    counted. Raises SourceError if one code comes in several units.
    """
    observations = items.observations.select(
        pl.col(c).cast(t) for c, t in OBSERVATION_COLUMNS.items()
    )
    observations = observations.with_columns(
        priority=pl.when(pl.col("variable").is_in(_WITH_FALLBACK))
        .then("priority")
        .otherwise(pl.lit(PREFERRED, pl.Int8))
    )
    observations = _refuse(
        observations, "no-value", pl.col("value").is_null() | ~pl.col("value").is_finite(), tally
    )
    if limits:
        observations = within_limits(observations, tally)
    observations = _within_stay(observations, "observation", stays, tally)
    observations = _without_copies(observations, ["stay", "variable", "hours", "priority"], tally)
    observations = observations.sort(
        "stay", "hours", pl.col("variable").replace_strict(_INDEX), "priority", "value"
    )

    events = items.events.select(pl.col(c).cast(t) for c, t in EVENT_COLUMNS.items())
    events = events.with_columns(
        _service_codes(events["code"]),
        value=pl.when(pl.col("value").is_finite()).then(pl.col("value")),  # else an event alone
    )
    events = _within_stay(events, "event", stays, tally)
    events = _latest_version(events, tally)
    events = events.sort("stay", "hours", "code", "value", nulls_last=True)

    codes = items.codes.select(pl.col(c).cast(t) for c, t in CODE_COLUMNS.items())
    codes = codes.with_columns(_service_codes(codes["code"])).sort(*CODE_COLUMNS, nulls_last=True)
    codes = codes.join(events.select("code").unique(), on="code", how="semi")
    in_units = codes.group_by("code").agg(pl.col("unit").n_unique()).filter(pl.col("unit") > 1)
    if not in_units.is_empty():
        raise SourceError(f"the event code {in_units['code'].min()!r} comes in several units")
    return Items(observations, events, codes.unique("code", keep="first", maintain_order=True))


def _service_codes(codes: pl.Series) -> pl.Series:
    """Codes as the service takes them: printable ASCII without blanks, at most 128 characters.

    A longer one keeps its beginning and gets a digest, so that two of them stay two.
    """
    plain = codes.str.replace_all(r"[^!-~]+", "_")
    long = plain.filter(plain.str.len_bytes() > MAX_CODE_CHARACTERS).unique().to_list()
    short = {c: f"{c[:119]}~{hashlib.sha256(c.encode()).hexdigest()[:8]}" for c in long}
    return plain.replace(short) if short else plain


def _refuse(frame: pl.DataFrame, reason: str, bad: pl.Expr, tally: Tally) -> pl.DataFrame:
    """The rows that are not bad; the others are counted by variable."""
    marked = frame.with_columns(_bad=bad.fill_null(value=False))
    refused = marked.filter("_bad")
    if not refused.is_empty():
        for name, n in refused.group_by("variable").len().iter_rows():
            tally.refused[f"{reason}:{name}"] += n
    return marked.filter(~pl.col("_bad")).drop("_bad")


def within_limits(frame: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Observations with their units repaired; those that cannot be true are refused."""
    value, variable = pl.col("value"), pl.col("variable")
    for reason, (name, (low, high), convert) in _REPAIRS.items():
        wrong = (variable == name) & value.is_between(low, high)
        n = frame.select(wrong.sum()).item()
        if n:
            tally.repaired[reason] += n
            frame = frame.with_columns(pl.when(wrong).then(convert(value)).otherwise(value))
    frame = _refuse(frame, "zero", variable.is_in(ZERO_IS_MISSING) & (value == 0), tally)
    lowest = variable.replace_strict({v.name: v.low for v in VARIABLES}, return_dtype=pl.Float64)
    highest = variable.replace_strict({v.name: v.high for v in VARIABLES}, return_dtype=pl.Float64)
    return _refuse(frame, "outside-limits", (value < lowest) | (value > highest), tally)


def _within_stay(frame: pl.DataFrame, kind: str, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Items from admission on that were known before the record ends."""
    frame = frame.join(stays.select("stay", "end_hours"), on="stay", how="inner")
    known = pl.max_horizontal("hours", "available_hours")
    counts = frame.select(
        untimed=pl.col("hours").is_null().sum(),
        before=(pl.col("hours") < 0).sum(),
        after=((pl.col("hours") >= 0) & (known > pl.col("end_hours"))).sum(),
    ).row(0, named=True)
    for reason, key in (
        ("untimed", "untimed"),
        ("before-admission", "before"),
        ("after-end", "after"),
    ):
        if counts[key]:
            tally.refused[f"{reason}:{kind}"] += counts[key]
    inside = (pl.col("hours") >= 0) & (known <= pl.col("end_hours"))
    return frame.filter(inside).drop("end_hours")


def _without_copies(frame: pl.DataFrame, key: list[str], tally: Tally) -> pl.DataFrame:
    """One row of those that say the same: the one known first."""
    once = frame.sort("available_hours", nulls_last=False).unique(
        [*key, "value"], keep="first", maintain_order=True
    )
    if len(once) < len(frame):
        tally.refused["duplicate:observation"] += len(frame) - len(once)
    return once


def _latest_version(events: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """One event a stay, code and minute: the last that became known, of those the largest value."""
    # Times are whole minutes after an admission that may have seconds, so none is near a border.
    minute = (pl.col("hours") * 60 + 1e-3).floor().cast(pl.Int64)
    once = (
        events.with_columns(_minute=minute)
        .sort("available_hours", "value", nulls_last=False)
        .unique(["stay", "code", "_minute"], keep="last", maintain_order=True)
        .drop("_minute")
    )
    if len(once) < len(events):
        tally.refused["duplicate:event"] += len(events) - len(once)
    return once
