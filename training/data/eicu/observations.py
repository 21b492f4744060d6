"""The 11 variables in eICU: rows that are kept of each table, and the observations they become.

`priority` 1 is what a service can tell for a fallback by its code: a cuff, a test strip. Of other
sources with a value at the same minute the one of the lowest `rank` is taken: the bedside monitor,
which is what a service receives, then the nurse, then a physician's note. A value that cannot be
true takes nobody's place, and neither does one that was known later.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from training.data.cleaning import within_limits
from training.data.eicu.files import count_early, hours, known_hours, number, of_cohort
from training.data.gcs import NORMAL, totals
from training.data.sources import Tally

OBSERVATION_COLUMNS = ("stay", "variable", "hours", "available_hours", "value", "priority")

# Nurse charting: an item by its label, by its name, or by its name under the coma score's label.
_COMA_SCORE = "Glasgow coma score"
_BY_LABEL = {
    "Heart Rate": "hr",
    "O2 Saturation": "spo2",
    "Respiratory Rate": "rr",
    "MAP (mmHg)": "mbp",
    "Arterial Line MAP (mmHg)": "mbp_arterial",
}
_BY_NAME = {
    "Invasive BP Systolic": "sbp_arterial",
    "Invasive BP Diastolic": "dbp_arterial",
    "Non-Invasive BP Systolic": "sbp",
    "Non-Invasive BP Diastolic": "dbp",
    "Temperature (C)": "temp",
    "Temperature (F)": "temp_fahrenheit",
}
_OF_COMA_SCORE = {"GCS Total": "gcs_total", "Eyes": "eye", "Verbal": "verbal", "Motor": "motor"}
# Missed by the benchmark.
_BY_LABEL_TOO = {"Score (Glasgow Coma Scale)": "gcs_total"}
_BY_NAME_TOO = {"Invasive BP Mean": "mbp_arterial", "Non-Invasive BP Mean": "mbp"}

_HOTTEST = 45.0
_FIO2_LABELS = ("FiO2", "FIO2 (%)", "O2 Percentage", "Set Fraction of Inspired Oxygen (FIO2)")
LAB_VARIABLES: Mapping[str, tuple[str, int]] = {
    "glucose": ("glucose", 0),
    "bedside glucose": ("glucose", 1),
    "pH": ("ph", 0),
    "FiO2": ("fio2", 0),
}
"""Lab name -> variable and priority. They are observations and not events."""

_PERIODIC = {
    "heartrate": "hr",
    "respiration": "rr",
    "sao2": "spo2",
    "temperature": "temp",
    "systemicsystolic": "sbp",
    "systemicdiastolic": "dbp",
    "systemicmean": "mbp",
}
_APERIODIC = {
    "noninvasivesystolic": "sbp",
    "noninvasivediastolic": "dbp",
    "noninvasivemean": "mbp",
}
_EXAM_COMPONENTS = {"Eyes": "eye", "Verbal": "verbal", "Motor": "motor"}


def charted_items(rows: pl.DataFrame, *, benchmark: bool) -> pl.DataFrame:
    """The rows of nurseCharting for a variable, with `item` and `value` (null: in words)."""
    label, name = pl.col("nursingchartcelltypevallabel"), pl.col("nursingchartcelltypevalname")
    by_label = _BY_LABEL if benchmark else _BY_LABEL | _BY_LABEL_TOO
    by_name = _BY_NAME if benchmark else _BY_NAME | _BY_NAME_TOO

    def item(text: pl.Expr, of: Mapping[str, str]) -> pl.Expr:
        return text.replace_strict(of, default=None, return_dtype=pl.String)

    return (
        rows.with_columns(
            item=pl.coalesce(
                item(label, by_label),
                item(name, by_name),
                pl.when(label == _COMA_SCORE).then(item(name, _OF_COMA_SCORE)),
            )
        )
        .filter(pl.col("item").is_not_null(), pl.col("nursingchartvalue").is_not_null())
        .with_columns(value=number(pl.col("nursingchartvalue")))
    )


def select_charting(
    rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally, *, benchmark: bool
) -> pl.DataFrame:
    """Of nurseCharting: stay, minutes, entered, item, value."""
    found = charted_items(of_cohort(rows, stays), benchmark=benchmark)
    _count_words(found, tally)
    count_early(found, "nursingchartentryoffset", "nursingchartoffset", "nurseCharting", tally)
    return found.drop_nulls("value").select(
        "stay",
        pl.col("nursingchartoffset").alias("minutes"),
        pl.col("nursingchartentryoffset").alias("entered"),
        "item",
        "value",
    )


def select_monitor(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of vitalPeriodic or vitalAperiodic: stay, minutes and a column for each variable."""
    columns = {c: v for c, v in (_PERIODIC | _APERIODIC).items() if c in rows.columns}
    return (
        of_cohort(rows, stays)
        .filter(pl.any_horizontal(pl.col(*columns).is_not_null()))
        .select(
            "stay",
            pl.col("observationoffset").alias("minutes"),
            *(pl.col(column).alias(variable) for column, variable in columns.items()),
        )
    )


def select_oxygen(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of respiratoryCharting: stay, minutes, entered, value (percent or fraction, as charted)."""
    found = of_cohort(
        rows.filter(
            pl.col("respchartvaluelabel").is_in(_FIO2_LABELS),
            pl.col("respchartvalue").is_not_null(),
        ),
        stays,
    ).with_columns(item=pl.lit("fio2"), value=number(pl.col("respchartvalue")))
    _count_words(found, tally)
    count_early(found, "respchartentryoffset", "respchartoffset", "respiratoryCharting", tally)
    return found.drop_nulls("value").select(
        "stay",
        pl.col("respchartoffset").alias("minutes"),
        pl.col("respchartentryoffset").alias("entered"),
        "value",
    )


def select_exam(rows: pl.DataFrame, stays: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Of physicalExam: stay, minutes, item (a component of the coma score, or its total), value."""
    path = pl.col("physicalexampath")
    component = path.str.extract("/GCS/(Eyes|Verbal|Motor) Score/")
    return (
        of_cohort(rows.filter(path.str.contains("/GCS/", literal=True)), stays)
        .with_columns(
            item=pl.when(path.str.contains("/GCS/[0-9]+$"))
            .then(pl.lit("gcs_total"))
            .otherwise(
                component.replace_strict(_EXAM_COMPONENTS, default=None, return_dtype=pl.String)
            ),
            value=number(pl.col("physicalexamvalue")),
        )
        .drop_nulls(["item", "value"])
        .select("stay", pl.col("physicalexamoffset").alias("minutes"), "item", "value")
    )


def observations(items: Mapping[str, pl.DataFrame], tally: Tally) -> pl.DataFrame:
    """The observations of a block of stays from what was kept of each table."""
    makers = {
        "nurseCharting": _of_charting,
        "vitalPeriodic": lambda f, t: _of_monitor(f, priority=0),
        "vitalAperiodic": lambda f, t: _of_monitor(f, priority=1),
        "lab": of_labs,
        "respiratoryCharting": _of_oxygen,
        "physicalExam": _of_exam,
    }
    columns = (*OBSERVATION_COLUMNS, "rank")
    found = pl.concat(
        make(items[name], tally).select(columns) for name, make in makers.items() if name in items
    )
    return _without_second_source(found, tally).select(OBSERVATION_COLUMNS)


def _without_second_source(found: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """The observations but those of which another source has a value, known no later.

    Of `found`, values that the cleaning refuses stay to be counted there.
    """
    found = found.with_row_index("row").with_columns(
        known=pl.max_horizontal("hours", "available_hours")
    )
    true = within_limits(found, Tally())
    same_minute = ["stay", "variable", "hours", "priority"]
    by_rank = (
        true.group_by(*same_minute, "rank")
        .agg(first_known=pl.col("known").min())
        .sort("rank")
        .with_columns(rival=pl.col("first_known").cum_min().shift(1).over(same_minute))
    )
    second = true.join(by_rank, on=[*same_minute, "rank"]).filter(
        pl.col("rival") <= pl.col("known")
    )
    if len(second):
        tally.refused["second-source:observation"] += len(second)
    return found.join(second, on="row", how="anti")


def of_labs(labs: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Glucose, pH and FiO2. Columns as `OBSERVATION_COLUMNS`, and `rank`."""
    labs = labs.filter(pl.col("labname").is_in(LAB_VARIABLES))
    oxygen = pl.col("labname") == "FiO2"
    flow = oxygen & pl.col("interface").str.to_lowercase().is_in(("lpm", "l/min"))
    hundredfold = oxygen & pl.col("value").is_between(2100, 10_000)
    found = labs.select(flow.sum().alias("flow"), (hundredfold & ~flow).sum().alias("hundredfold"))
    if n := found["flow"].item():
        tally.refused["flow:fio2"] += n
    if n := found["hundredfold"].item():
        tally.repaired["hundredfold:fio2"] += n
    return labs.filter(flow.fill_null(value=False).not_()).select(
        "stay",
        hours("minutes").alias("hours"),
        known_hours("revised", "minutes").alias("available_hours"),
        variable=pl.col("labname").replace_strict({n: v for n, (v, _) in LAB_VARIABLES.items()}),
        value=pl.when(hundredfold).then(pl.col("value") / 100).otherwise("value"),
        priority=pl.col("labname").replace_strict(
            {n: p for n, (_, p) in LAB_VARIABLES.items()}, return_dtype=pl.Int8
        ),
        rank=pl.lit(1, pl.Int8),
    )


def charted_values(charted: pl.DataFrame) -> pl.DataFrame:
    """Nurse charting but for components of the coma score: stay, hours, ..., value, `item`."""
    fahrenheit = pl.col("item") == "temp_fahrenheit"
    return charted.filter(~pl.col("item").is_in(NORMAL)).select(
        "stay",
        hours("minutes").alias("hours"),
        known_hours("entered", "minutes").alias("available_hours"),
        "item",
        variable=pl.col("item").str.replace("_arterial$|_fahrenheit$", ""),
        value=pl.when(fahrenheit).then((pl.col("value") - 32) * 5 / 9).otherwise("value"),
    )


def _of_charting(charted: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    cuff = pl.col("item").is_in(("sbp", "dbp", "mbp"))
    values = charted_values(charted)
    # Beyond 45 degrees it would look like a value that is still in Fahrenheit.
    too_hot = (pl.col("item") == "temp_fahrenheit") & (pl.col("value") > _HOTTEST)
    if n := values.select(too_hot.sum()).item():
        tally.refused["outside-limits:temp"] += n
    values = values.filter(~too_hot).with_columns(
        priority=pl.when(cuff).then(1).otherwise(0).cast(pl.Int8),
        # Of a temperature in both units one was computed from the other.
        rank=pl.when(pl.col("item") == "temp_fahrenheit").then(2).otherwise(1).cast(pl.Int8),
    )
    sums = _sums(charted, known_hours("entered", "minutes"), tally).with_columns(
        priority=pl.lit(0, pl.Int8), rank=pl.lit(2, pl.Int8)
    )
    columns = (*OBSERVATION_COLUMNS, "rank")
    return pl.concat([values.select(columns), sums.select(columns)])


def _of_monitor(monitor: pl.DataFrame, *, priority: int) -> pl.DataFrame:
    return (
        monitor.unpivot(index=["stay", "minutes"], variable_name="variable", value_name="value")
        .drop_nulls("value")
        .select(
            "stay",
            "variable",
            hours("minutes").alias("hours"),
            pl.lit(None, pl.Float64).alias("available_hours"),
            "value",
            priority=pl.lit(priority, pl.Int8),
            rank=pl.lit(0, pl.Int8),
        )
    )


def _of_oxygen(charted: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    return charted.select(
        "stay",
        hours("minutes").alias("hours"),
        known_hours("entered", "minutes").alias("available_hours"),
        "value",
        variable=pl.lit("fio2"),
        priority=pl.lit(0, pl.Int8),
        rank=pl.lit(0, pl.Int8),
    )


def _of_exam(exam: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Coma scores that a physician noted."""
    at_once = pl.lit(None, pl.Float64)
    noted = exam.filter(pl.col("item") == "gcs_total").select(
        "stay",
        hours("minutes").alias("hours"),
        at_once.alias("available_hours"),
        "value",
        variable=pl.lit("gcs_total"),
        rank=pl.lit(3, pl.Int8),
    )
    sums = _sums(exam, at_once, tally).with_columns(rank=pl.lit(4, pl.Int8))
    both = pl.concat([noted, sums.select(noted.columns)])
    return both.with_columns(priority=pl.lit(0, pl.Int8))


def _sums(rows: pl.DataFrame, available: pl.Expr, tally: Tally) -> pl.DataFrame:
    """Totals of the components among the rows: stay, hours, available_hours, value, variable."""
    components = rows.filter(pl.col("item").is_in(NORMAL)).select(
        "stay",
        hours("minutes").alias("hours"),
        available.alias("available_hours"),
        "value",
        component="item",
    )
    # The best score of a component is that of a healthy patient.
    best = pl.col("component").replace_strict(NORMAL, return_dtype=pl.Float64)
    possible = components.filter(pl.col("value").is_between(1, best))
    if len(possible) < len(components):
        tally.refused["outside-limits:gcs component"] += len(components) - len(possible)
    return totals(possible).with_columns(variable=pl.lit("gcs_total"))


def _count_words(rows: pl.DataFrame, tally: Tally) -> None:
    """Count rows without a value: words are not readable, but for "unable to score"."""
    words = rows.filter(pl.col("value").is_null())
    for item, n in words.group_by("item").len().iter_rows():
        score = item == "gcs_total" or item in NORMAL
        tally.refused[f"{'no-score' if score else 'not-a-number'}:{item}"] += n
