"""Values of the 11 variables into canonical units, for whole tables.

`llm4ehr.variables` converts one value; here it is asked once for each pair of variable and unit of
a table. A missing unit is inferred where only one can have produced the value, never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from llm4ehr.variables import (
    PREFERRED,
    CodeError,
    Unit,
    UnitError,
    Variable,
    convert,
    resolve_code,
    resolve_name,
)

_PAIR = ("variable", "unit")
_PLAN_SCHEMA: dict[str, Any] = {
    "variable": pl.String,
    "unit": pl.String,
    "_name": pl.String,
    "_priority": pl.Int8,
    "_low": pl.Float64,
    "_high": pl.Float64,
    "_code_reason": pl.String,
    "_unit_reason": pl.String,
    "_message": pl.String,
}
_RANGE_SCHEMA: dict[str, Any] = dict.fromkeys(_PAIR, pl.String) | dict.fromkeys(
    ("_from", "_to", "_zero", "_multiply", "_divide"), pl.Float64
)
_PROBE = 50.0  # no two units of a variable bring it to the same value


def with_canonical(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` with what its values mean, in the same order.

    `frame` has `variable` (a name, or a LOINC or MDC code), `unit` and `_value` (finite or null).
    New columns: `_name` and `_priority` of the variable, its limits `_low` and `_high`,
    `_canonical` (null: not convertible), and the reason if something is wrong with the variable
    (`_code_reason`) or, where `_canonical` is null, with the unit (`_unit_reason`), with a
    `_message` for people.
    """
    plans = [_plan(*pair) for pair in frame.select(_PAIR).unique().iter_rows()]
    of_pair = pl.DataFrame([p.row for p in plans], schema=_PLAN_SCHEMA, orient="row")
    ranges = pl.DataFrame([r for p in plans for r in p.ranges], schema=_RANGE_SCHEMA, orient="row")
    value = (pl.col("_value") - pl.col("_zero")) * pl.col("_multiply") / pl.col("_divide")
    frame = frame.with_row_index("_row")
    canonical = (
        frame.select("_row", "_value", *_PAIR)
        .join(ranges, on=_PAIR, nulls_equal=True)
        .filter(pl.col("_value").is_between("_from", "_to"))
        .select("_row", _canonical=value)
    )
    frame = frame.join(of_pair, on=_PAIR, how="left", nulls_equal=True, maintain_order="left")
    return frame.join(canonical, on="_row", how="left", maintain_order="left").drop("_row")


def variables_named(texts: Iterable[str | None]) -> set[str]:
    """The variables that these names and codes stand for; those that stand for none are passed."""
    plans = (_plan(text, None) for text in texts)
    return {name for p in plans if (name := p.row[len(_PAIR)]) is not None}


class _Plan(NamedTuple):
    """What to do with the rows of a pair of variable and unit.

    `row` goes with `_PLAN_SCHEMA`. A value in one of `ranges`, which are disjoint, is converted
    with its numbers; where it is in none, `row` has the reason.
    """

    row: tuple[Any, ...]
    ranges: list[tuple[Any, ...]]


@lru_cache(maxsize=4096)
def _plan(name: str | None, unit: str | None) -> _Plan:
    pair = (name, unit)
    if name is None:
        return _Plan((*pair, *[None] * 7), [])
    try:
        variable, priority = _variable(name)
    except CodeError as error:
        return _Plan((*pair, None, None, None, None, error.reason, None, str(error)), [])
    known = (*pair, variable.name, priority, variable.low, variable.high, None)
    if unit is None:
        if variable.unit_optional:
            units = [(-np.inf, np.inf, variable.units[0])]
        else:
            units = [(*u.inferred, u) for u in variable.units if u.inferred is not None]
        accepted = ", ".join(u.ucum for u in variable.units)
        message = f"the value does not tell its unit; {variable.name} is accepted in {accepted}"
        return _Plan((*known, "unit-missing", message), [_range(pair, *u) for u in units])
    try:
        probe = convert(variable, _PROBE, unit).value
    except UnitError as error:
        return _Plan((*known, error.reason, str(error)), [])
    found = next(u for u in variable.units if u.to_canonical(_PROBE) == probe)
    return _Plan((*known, None, None), [_range(pair, -np.inf, np.inf, found)])


def _variable(text: str) -> tuple[Variable, int]:
    """Variable and priority of `hr`, `8867-4`, `LOINC/8867-4` or `MDC/147842`."""
    system, slash, code = text.rpartition("/")
    if slash or text[:1].isdigit():
        found = resolve_code(code, system or None)
        return found.variable, found.priority
    return resolve_name(text.lower()), PREFERRED


def _range(pair: tuple[str | None, str | None], low: float, high: float, unit: Unit) -> Any:
    return (*pair, low, high, unit.zero, unit.multiply, unit.divide)
