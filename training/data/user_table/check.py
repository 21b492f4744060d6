"""Which rows of a unit's own tables cannot be used, and why.

Every rule is a Polars expression over the text of a row, so that a table is checked at the speed of
a scan and nothing is read in two ways: the same functions give the rows of the validation report
and the rows that enter the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from llm4ehr.episode import UNIT_TYPES

MAX_REFUSED = 0.01
"""Share of refused rows of a file from which on it is taken to be wrong as a whole."""

MAX_HOURS = float(np.iinfo(np.int16).max)
_FIRST_LINES = 5  # of the refused rows of a file that a message names

_US_PER_HOUR = 3.6e9
_OFFSET = r"(?:Z|UTC|[+-](?:0\d|1[0-4]):?[0-5]\d)"  # none on earth is more than 14 hours
_ZONE = rf"({_OFFSET})$"
_TIME = rf"^\d{{4}}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.]\d{{1,9}})?)?(?: ?{_OFFSET})?$"
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
_SEX = {"female": "female", "f": "female", "male": "male", "m": "male"}
_NO_SEX = ("other", "unknown")  # the store knows two, and null


class Rule(NamedTuple):
    """A row is refused where `bad` is true; `reason` is for programs, `message` for people.

    Neither ever repeats what stands in the row.
    """

    column: str
    reason: str | pl.Expr
    message: str | pl.Expr
    bad: pl.Expr


@dataclass(slots=True)
class FileReport:
    """What was found in one file."""

    file: str
    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def n_refused(self) -> int:
        """Number of refused rows."""
        return self.refused.total()

    @property
    def passed(self) -> bool:
        """Whether at most 1 % of the rows are refused."""
        return self.n_refused <= MAX_REFUSED * self.rows

    def add(self, n_rows: int, refused: pl.DataFrame) -> None:
        """Count the refused rows of `n_rows` more rows."""
        self.rows += n_rows
        for reason, n in refused.group_by("reason").len().iter_rows():
            self.refused[reason] += n
        for line, column, reason, _ in refused.head(_FIRST_LINES - len(self.first)).iter_rows():
            self.first.append(f"line {line} ({column}: {reason})")

    def __str__(self) -> str:
        text = f"{self.file}: {self.rows} rows, {self.n_refused} refused"
        by_reason = ", ".join(f"{reason} {n}" for reason, n in sorted(self.refused.items()))
        return text + (f" ({by_reason}); first: {', '.join(self.first)}" if by_reason else "")


@dataclass(slots=True)
class Report:
    """Result of checking all files of a folder."""

    files: list[FileReport] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the tables can be read into a store."""
        return all(file.passed for file in self.files)

    def __str__(self) -> str:
        return "\n".join(str(file) for file in self.files)


def sift(frame: pl.DataFrame, rules: Sequence[Rule]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows that break no rule, and for the others line, column, reason and message.

    A row is refused for the first rule that it breaks.
    """

    number_of_rule = pl.coalesce(
        pl.when(rule.bad).then(pl.lit(i, pl.Int16)) for i, rule in enumerate(rules)
    )
    marked = frame.with_columns(_rule=number_of_rule)

    def of_rule(what: Sequence[str | pl.Expr]) -> pl.Expr:
        values = [pl.lit(w) if isinstance(w, str) else w for w in what]
        return pl.coalesce(
            pl.when(pl.col("_rule") == i).then(value) for i, value in enumerate(values)
        )

    refused = marked.filter(pl.col("_rule").is_not_null()).select(
        "line",
        column=of_rule([rule.column for rule in rules]),
        reason=of_rule([rule.reason for rule in rules]),
        message=of_rule([rule.message for rule in rules]),
    )
    return marked.filter(pl.col("_rule").is_null()).drop("_rule"), refused


def trimmed(frame: pl.DataFrame) -> pl.DataFrame:
    """The text columns without blanks around; what is empty is null."""
    text = pl.col(pl.String).str.strip_chars()
    return frame.with_columns(pl.when(text != "").then(text).name.keep())


def number(column: str) -> pl.Expr:
    """The number of a text; null where it is none or not finite."""
    value = pl.col(column).cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def with_moments(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """`frame` with `_COLUMN_at` and `_COLUMN_zone` for each of the columns of date-times.

    `_at` is the time, in UTC if it has an offset, null where it is none; `_zone` whether it has an
    offset.
    """
    return frame.with_columns(
        expression
        for column in columns
        for expression in (
            _moment(pl.col(column)).alias(f"_{column}_at"),
            has_zone(pl.col(column)).alias(f"_{column}_zone"),
        )
    )


def has_zone(text: pl.Expr) -> pl.Expr:
    """Whether date-times have an offset."""
    return text.str.slice(16).str.contains(_ZONE)


def _moment(text: pl.Expr) -> pl.Expr:
    # Sliced, since the parts stand at fixed places and regular expressions are slow.
    rest = text.str.slice(16)
    second = rest.str.extract(r"^(:\d{2}(?:[.]\d+)?)").fill_null(":00")
    wall = pl.concat_str(
        text.str.slice(0, 10), pl.lit(" "), text.str.slice(11, 5), second
    ).str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False)
    zone = rest.str.extract(_ZONE)
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    digits = zone.str.replace(":", "", literal=True).str.slice(1).cast(pl.Int64, strict=False)
    minutes = (sign * (digits // 100 * 60 + digits % 100)).fill_null(0)
    utc = pl.when(zone.is_null()).then(wall).otherwise(wall - pl.duration(minutes=minutes))
    return pl.when(text.str.contains(_TIME)).then(utc)


def required(column: str) -> Rule:
    """The rule that the column is not empty."""
    return Rule(column, "missing-value", "the field is empty", pl.col(column).is_null())


def is_number(column: str, low: float = -np.inf, high: float = np.inf) -> list[Rule]:
    """The rules that the column is empty or a number from `low` to `high`."""
    given = pl.col(column).is_not_null()
    return [
        Rule(column, "not-a-number", "not a finite number", given & number(column).is_null()),
        Rule(
            column,
            "out-of-range",
            f"not between {low:g} and {high:g}",
            ~number(column).is_between(low, high),
        ),
    ]


def is_moment(column: str, zoned: bool) -> list[Rule]:
    """The rules that the column is empty or a date-time, with an offset if `zoned` else without.

    The frame has the columns of `with_moments`.
    """
    given = pl.col(column).is_not_null()
    others = "have" if zoned else "have no"
    return [
        Rule(
            column,
            "not-a-time",
            "not a date with a time, such as 2026-03-01 14:30 or 2026-03-01T14:30:00+01:00",
            given & pl.col(f"_{column}_at").is_null(),
        ),
        Rule(
            column,
            "time-zone-mixed",
            f"the admissions {others} UTC offset",
            given & (pl.col(f"_{column}_zone") != zoned),
        ),
    ]


def is_one_of(column: str, allowed: Sequence[str]) -> Rule:
    known = pl.col(column).str.to_lowercase().is_in(list(allowed))
    return Rule(column, "unknown-value", f"not one of {', '.join(allowed)}", ~known)


def check_stays(
    frame: pl.DataFrame, *, moments: bool, zoned: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Stays with typed columns, and refused rows.

    `moments`: admission, discharge and death are date-times; else hours since admission. Besides
    the columns of `episodes.parquet` that the file gives, there are `end_hours`, `death_hours` and
    `_admission` (null without date-times).
    """
    rules = [required("episode_id"), required("subject_id")]
    twice = pl.col("episode_id").is_duplicated() & ~pl.col("episode_id").is_first_distinct()
    rules.append(Rule("episode_id", "duplicate-episode", "the stay is on an earlier line", twice))
    if moments:
        frame = with_moments(frame, ("admission_time", "discharge_time", "death_time"))
        rules += [required("admission_time"), *is_moment("admission_time", zoned)]
        rules += [required("discharge_time"), *is_moment("discharge_time", zoned)]
        rules += is_moment("death_time", zoned)
        admission = pl.col("_admission_time_at")
        end = hours_between(admission, pl.col("_discharge_time_at"))
        los, death = end, hours_between(admission, pl.col("_death_time_at"))
        end_column, death_column = "discharge_time", "death_time"
    else:
        rules += [required("end_hours"), *is_number("end_hours")]
        rules += [*is_number("los_hours", 0, MAX_HOURS), *is_number("death_hours")]
        admission = pl.lit(None, pl.Datetime("us"))
        end, los, death = number("end_hours"), number("los_hours"), number("death_hours")
        end_column, death_column = "end_hours", "death_hours"
    rules += [
        Rule(end_column, "out-of-range", "the record does not end after admission", end <= 0),
        Rule(end_column, "out-of-range", "the record is longer than 3.7 years", end > MAX_HOURS),
        Rule(death_column, "out-of-range", "the death is before admission", death < 0),
        *is_number("age_years", 0, 130),
        *is_number("height_cm", 20, 300),
        *is_number("weight_kg", 0.2, 700),
        is_one_of("sex", (*_SEX, *_NO_SEX)),
        is_one_of("unit_type", UNIT_TYPES),
        is_one_of("mortality", (*_TRUE, *_FALSE)),
    ]
    died = pl.col("mortality").str.to_lowercase().is_in(_TRUE).fill_null(value=False)
    rules.append(
        Rule(
            "mortality",
            "contradiction",
            "the death is not after the end of the record, but mortality is not true",
            (death <= end) & ~died,
        )
    )
    if frame["split"].null_count() < len(frame):
        first = pl.col("split").drop_nulls().first().over("subject_id")
        other = pl.col("split") != first
        rules += [
            required("split"),
            Rule("split", "split-conflict", "the subject is in another split above", other),
        ]
    good, refused = sift(frame, rules)
    mortality = pl.col("mortality").str.to_lowercase()
    typed = good.select(
        "episode_id",
        "subject_id",
        "split",
        end.alias("end_hours"),
        los.alias("los_hours"),
        death.alias("death_hours"),
        admission.alias("_admission"),
        *(number(c).alias(c) for c in ("age_years", "height_cm", "weight_kg")),
        sex=pl.col("sex").str.to_lowercase().replace_strict(_SEX, default=None),
        unit_type=pl.col("unit_type").str.to_lowercase(),
        mortality=pl.when(mortality.is_in(_TRUE))
        .then(True)
        .when(mortality.is_in(_FALSE))
        .then(False),
    )
    return typed, refused


def check_diagnoses(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Diagnoses as `phenotypes` wants them, and refused rows."""
    version = pl.col("icd_version").str.extract(r"^(9|10)(?:\.0+)?$").cast(pl.Int32)
    rules = [
        required("icd_version"),
        Rule("icd_version", "unknown-value", "not 9 or 10", version.is_null()),
        required("icd_code"),
    ]
    good, refused = sift(frame, [*belongs(), *rules])
    return good.select("stay", "icd_code", icd_version=version), refused


def belongs() -> list[Rule]:
    """The rules that a row has a stay. The frame has `stay`, a row number of the stays or null."""
    return [
        required("episode_id"),
        Rule("episode_id", "unknown-episode", "stays has no such stay", pl.col("stay").is_null()),
    ]


def hours_between(start: pl.Expr, end: pl.Expr) -> pl.Expr:
    return (end - start).dt.total_microseconds() / _US_PER_HOUR
