"""Observations and events of a unit's own tables: which rows are sound, and what they say."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from llm4ehr.variables import FALLBACK, PREFERRED
from training.data.codes import CODES
from training.data.unit_conversion import with_canonical
from training.data.user_table.check import (
    Rule,
    belongs,
    hours_between,
    is_moment,
    is_number,
    is_one_of,
    number,
    required,
    sift,
    with_moments,
)

_PRIORITY = {"preferred": PREFERRED, "0": PREFERRED, "fallback": FALLBACK, "1": FALLBACK}
_ICD = r"^(?i)icd[ -]?(9|10|11)?[ -]?(cm|gm|pcs|who|am|ca)?$"
_CODE = r"^[^/\s]+/.+$"


class Clock(NamedTuple):
    """How the times of a file are written: as date-times (with an offset or not) or as hours."""

    moments: bool
    zoned: bool

    def column(self, stem: str = "") -> str:
        """Name of a column of times: `time` or `hours`, `end_time` or `end_hours` ..."""
        name = "time" if self.moments else "hours"
        return f"{stem}_{name}" if stem else name

    def rules(self, stem: str = "") -> list[Rule]:
        """The rules of a column of times."""
        column = self.column(stem)
        return is_moment(column, self.zoned) if self.moments else is_number(column)

    def read(self, frame: pl.DataFrame, *stems: str) -> pl.DataFrame:
        """`frame` with what `rules` and `hours` of these columns need."""
        columns = [self.column(stem) for stem in stems]
        return with_moments(frame, columns) if self.moments else frame

    def hours(self, stem: str = "") -> pl.Expr:
        """Hours since admission."""
        column = self.column(stem)
        if self.moments:
            return hours_between(pl.col("_admission"), pl.col(f"_{column}_at"))
        return number(column)


def check_observations(frame: pl.DataFrame, clock: Clock) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Observations in canonical units, and refused rows.

    `frame` has `stay` and `_admission` of the stay beside the columns of the file.
    """
    frame = clock.read(frame, "", "available")
    frame = with_canonical(frame.with_columns(_value=number("value")))
    reason, message, value = pl.col("_code_reason"), pl.col("_message"), pl.col("_canonical")
    good, refused = sift(
        frame,
        [
            *belongs(),
            required(clock.column()),
            *clock.rules(),
            *clock.rules("available"),
            required("variable"),
            Rule("variable", reason, message, reason.is_not_null()),
            required("value"),
            Rule("value", "not-a-number", "not a finite number", pl.col("_value").is_null()),
            Rule("unit", pl.col("_unit_reason"), message, value.is_null()),
            is_one_of("priority", tuple(_PRIORITY)),
            Rule(
                "value",
                "outside-limits",
                pl.format("{} is possible from {} to {}", "_name", "_low", "_high"),
                ~value.is_between("_low", "_high"),
            ),
        ],
    )
    given = (
        pl.col("priority")
        .str.to_lowercase()
        .replace_strict(_PRIORITY, default=None, return_dtype=pl.Int8)
    )
    return good.select(
        pl.col("stay"),
        variable="_name",
        hours=clock.hours(),
        available_hours=clock.hours("available"),
        value=value,
        priority=given.fill_null(pl.col("_priority")),
    ), refused


CODE_COLUMNS = dict.fromkeys(("code", "descriptor", "unit"), pl.String)


def known_codes(own: pl.DataFrame) -> pl.DataFrame:
    """Codes with a descriptor and a unit: those of the unit's own `codes`, and the shared ones.

    Analytes that every data set shares keep the unit of `training.data.codes`. Result: `code`,
    `_descriptor`, `_unit` (that of the code), `_own_unit` (of values without one; null: unknown).
    """
    shared = pl.DataFrame(
        [(code, info.descriptor, info.unit) for code, info in CODES.items()],
        schema=CODE_COLUMNS,
        orient="row",
    )
    own = own.with_columns(_own_unit="unit")
    both = shared.join(own, on="code", how="full", coalesce=True, suffix="_own")
    return both.select(
        "code",
        "_own_unit",
        _descriptor=pl.coalesce("descriptor", "descriptor_own"),
        _unit=pl.coalesce("unit", "unit_own"),
    )


def check_codes(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The file of codes as `CODE_COLUMNS`, and refused rows."""
    twice = pl.col("code").is_duplicated() & ~pl.col("code").is_first_distinct()
    rules = [
        *_code_rules(),
        Rule("code", "duplicate-code", "the code is on an earlier line", twice),
    ]
    good, refused = sift(frame, rules)
    return good.select("code", pl.col("descriptor").str.to_lowercase(), "unit"), refused


def _code_rules() -> list[Rule]:
    shaped = pl.col("code").str.contains(_CODE)
    system = pl.col("code").str.extract(r"^([^/]+)/")
    return [
        required("code"),
        Rule(
            "code",
            "code-without-system",
            "write the system before the code, such as LOINC/2160-0 or LOCAL/crp",
            ~shaped,
        ),
        Rule(
            "code",
            "diagnosis-code",
            "codes of the ICD are assigned after the stay; diagnoses have a table of their own",
            system.str.contains(_ICD),
        ),
    ]


def check_events(
    frame: pl.DataFrame, clock: Clock, codes: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events as `stay`, `code`, `hours`, `available_hours`, `value`, and what `describe` reads.

    And refused rows. A row with an end is two events: its start, with the value, and its end. A
    value in another unit than that of its code has the unit in the code. `codes`: `known_codes`.
    """
    frame = clock.read(frame, "", "end", "available").with_columns(_value=number("value"))
    frame = frame.join(codes, on="code", how="left", maintain_order="left")
    start, end = clock.hours(), clock.hours("end")
    unit = pl.coalesce("unit", "_own_unit")
    untold = unit.is_null() & pl.col("_unit").is_not_null() & pl.col("_value").is_not_null()
    good, refused = sift(
        frame,
        [
            *belongs(),
            required(clock.column()),
            *clock.rules(),
            *clock.rules("end"),
            *clock.rules("available"),
            Rule(
                clock.column("end"), "end-before-start", "the end is before the start", end < start
            ),
            *_code_rules(),
            *is_number("value"),
            Rule("unit", "unit-missing", "the code is in use with more than one unit", untold),
        ],
    )
    usual = _folded(unit) == _folded(pl.col("_unit"))
    other = pl.col("_value").is_not_null() & unit.is_not_null() & ~usual.fill_null(value=False)
    good = good.with_columns(
        code=pl.when(other).then(pl.concat_str("code", pl.lit("//"), unit)).otherwise("code"),
        unit=pl.when(pl.col("_value").is_not_null()).then(
            pl.when(other).then(unit).otherwise("_unit")
        ),
        descriptor=pl.coalesce("_descriptor", pl.col("descriptor").str.to_lowercase()),
        plain=_plain_words(pl.col("code")),
        _hours=start,
        _end=end,
        _known=clock.hours("available"),
        _lasts=end.is_not_null(),
    )
    point = good.filter(~pl.col("_lasts"))
    lasting = good.filter("_lasts")
    none = pl.lit(None, pl.String)
    parts = (
        (point, "", "_hours", "_known", "_value", pl.col("unit")),
        (lasting, "start", "_hours", "_known", "_value", pl.col("unit")),
        (lasting, "end", "_end", pl.max_horizontal("_end", "_known"), None, none),
    )
    return pl.concat(_part(*p) for p in parts), refused


def _part(
    rows: pl.DataFrame,
    edge: str,
    hours: str,
    known: str | pl.Expr,
    value: str | None,
    unit: pl.Expr,
) -> pl.DataFrame:
    """One side of the events: those at a point, the starts or the ends."""
    suffix, word = (f"//{edge.upper()}", f" {edge}") if edge else ("", "")
    return rows.select(
        "stay",
        code=pl.col("code") + suffix,
        hours=hours,
        available_hours=known,
        value=pl.col(value) if value else pl.lit(None, pl.Float64),
        descriptor=pl.col("descriptor") + word,
        unit=unit,
        plain=pl.col("plain") + word,
    )


def _plain_words(code: pl.Expr) -> pl.Expr:
    """The code without its system, in lower-case words."""
    return code.str.replace(r"^[^/]+/", "").str.replace_all(r"[/_\s]+", " ").str.to_lowercase()


def _folded(unit: pl.Expr) -> pl.Expr:
    return unit.str.replace_all(r"\s", "").str.to_lowercase()


def describe(events: pl.DataFrame) -> pl.DataFrame:
    """What the codes of events mean: `code`, `descriptor`, `unit`, `plain`, one row for each code.

    `events` may also hold several results of this function.
    """
    return events.group_by("code").agg(
        pl.col("descriptor").min(), pl.col("unit").min(), pl.col("plain").min()
    )
