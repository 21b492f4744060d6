"""What MIMIC-III and MIMIC-IV share: items of the bedside charts, laboratory results, infusions.

Both come from the same hospital. Items from 220000 on are those of its MetaVision system and have
the same numbers in both; so have the items of its laboratory.

All functions take rows of whole stays with `stay` and hours since ICU admission, and count in the
tally what they drop. Where rows are read in is the readers' business.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from training.data import gcs
from training.data.codes import CODES
from training.data.mimic.units import in_usual_unit
from training.data.sources import SourceError, Tally
from training.data.tables import load

LAB_DELAY_HOURS: Mapping[str, float] = {"blood gas": 0.5, "other": 2.0}
"""When a result is known, in hours after the sample was drawn, where the source does not say.

In the eICU demo, which does, nine in ten blood gases are there after 28 minutes (median 6) and nine
in ten other results after 97 minutes (median 35); rounded up to the next half hour.
"""

COPY_HOURS = 1.5
"""Laboratory results are copied into the charts at their own time or an hour later."""

_SPECIMEN_TYPES = (50800, 52033)
_PH, _SATURATION = 50820, 50817
_ONE_MINUTE = 1 / 60 + 1e-6
_COMPONENTS = {"gcs_eye": "eye", "gcs_verbal": "verbal", "gcs_motor": "motor"}
# The best score of a component is that of a healthy patient.
_BEST_SCORE = {variable: gcs.NORMAL[component] for variable, component in _COMPONENTS.items()}
_OBSERVATION = ("stay", "variable", "hours", "available_hours", "value", "priority")
_CHARTED = (*_OBSERVATION, "lab_copy")
_EVENT = ("stay", "code", "hours", "available_hours", "value")


def chart_items(profile: str) -> pl.DataFrame:
    """Items of the chart tables that a profile reads: itemid, variable, priority and so on."""
    return _items(profile).filter(table="chartevents")


def lab_observation_items(profile: str) -> pl.DataFrame:
    """Items of the laboratory that are variables: glucose, pH, FiO2 and saturation of blood."""
    return _items(profile).filter(table="labevents")


def _items(profile: str) -> pl.DataFrame:
    flags = {"fahrenheit": pl.Int8, "lab_copy": pl.Int8, "benchmark": pl.Int8, "strict": pl.Int8}
    items = load("mimic3_items", itemid=pl.Int32, priority=pl.Int8, **flags)
    return items.filter(pl.col(profile) == 1).with_columns(
        pl.col("fahrenheit", "lab_copy").cast(pl.Boolean)
    )


def check_lab_delay(delay: float | None) -> None:
    """Raise SourceError unless `delay` is a number of hours, 0 or more, or None."""
    if delay is not None and not delay >= 0:
        raise SourceError(f"lab_delay is {delay}, but no result is known before its sample")


def number(text: pl.Expr) -> pl.Expr:
    """A result as a number; "<0.01", ">500" and "LESS THAN 5" give their limit. Null: none."""
    comparator = r"(?i)^\s*(?:[<>]=?|less than|greater than)\s*"
    return text.str.replace(comparator, "").str.strip_chars().cast(pl.Float64, strict=False)


def refuse(rows: pl.DataFrame, bad: pl.Expr, reason: str, tally: Tally) -> pl.DataFrame:
    """The rows that are not bad; the others are counted by `variable`."""
    marked = rows.with_columns(_bad=bad.fill_null(False))
    for name, n in marked.filter("_bad").group_by("variable").len().iter_rows():
        tally.refused[f"{reason}:{name}"] += n
    return marked.filter(~pl.col("_bad")).drop("_bad")


def chart_observations(rows: pl.DataFrame, items: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Observations of the bedside charts.

    `rows`: stay, itemid, hours, available_hours, text (the value as charted), number (as the source
    itself read it). `items`: see `chart_items`. Result: the columns of `Items.observations`, and
    `lab_copy`: whether the item repeats results of the laboratory.
    """
    rows = rows.join(items.drop("label", "table"), on="itemid", maintain_order="left")
    is_component = pl.col("variable").is_in(list(_COMPONENTS))
    # A pressure charted as "120/80" stands under the systolic and under the diastolic item.
    pair = pl.col("text").str.extract_groups(r"^\s*(?<sbp>\d+)\s*/\s*(?<dbp>\d+)\s*$")
    of_pair = (
        pl.when(variable="sbp")
        .then(pair.struct.field("sbp"))
        .when(variable="dbp")
        .then(pair.struct.field("dbp"))
    )
    charted = pl.coalesce(number(pl.col("text")), of_pair.cast(pl.Float64), "number")
    celsius = pl.when("fahrenheit").then((charted - 32) * 5 / 9).otherwise(charted)
    score = pl.coalesce(gcs.score_of(pl.col("text")), "number")
    rows = rows.with_columns(value=pl.when(is_component).then(score).otherwise(celsius))
    unread = pl.col("value").is_null() & pl.col("text").is_not_null()
    rows = refuse(rows, unread, "not-a-number", tally)
    rows = refuse(rows, pl.col("value").is_null(), "no-value", tally)
    best = pl.col("variable").replace_strict(_BEST_SCORE, default=None, return_dtype=pl.Float64)
    no_score = is_component & ~pl.col("value").is_between(1, best)
    rows = refuse(rows, no_score, "outside-limits", tally)
    # A reading beyond 45 degrees would look like one that is still in Fahrenheit.
    rows = refuse(rows, pl.col("fahrenheit") & (pl.col("value") > 45), "outside-limits", tally)
    totals = _coma_scores(rows, tally)
    others = rows.filter(~is_component & (pl.col("variable") != "gcs_total"))
    return pl.concat([others.select(_CHARTED), totals.select(_CHARTED)])


def _coma_scores(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Total scores: the sum where all components or no total were charted, else the total."""
    components = rows.filter(pl.col("variable").is_in(list(_COMPONENTS))).with_columns(
        component=pl.col("variable").replace_strict(_COMPONENTS, return_dtype=pl.String)
    )
    time = ["stay", "hours"]
    complete = components.group_by(time).agg(n=pl.col("component").n_unique()).filter(n=3)
    charted = rows.filter(variable="gcs_total")
    totals = charted.join(complete, on=time, how="anti")
    if len(totals) < len(charted):
        tally.repaired["summed:gcs_total"] += len(charted) - len(totals)
    sums = gcs.totals(components.select(*time, "available_hours", "component", "value"))
    sums = sums.join(totals, on=time, how="anti").with_columns(
        variable=pl.lit("gcs_total"), priority=pl.lit(0, pl.Int8), lab_copy=pl.lit(False)
    )
    return pl.concat([totals.select(_CHARTED), sums.select(_CHARTED)])


def without_lab_copies(
    charted: pl.DataFrame, laboratory: pl.DataFrame, stays: pl.DataFrame, tally: Tally
) -> pl.DataFrame:
    """The charted observations that do not just repeat one of the laboratory, without `lab_copy`.

    A copy has the same variable and value within 90 minutes. The row of the laboratory is the
    better one: its time is that of the sample. But a sample from before admission, or with a result
    after the end of the record (`stays`: stay, end_hours), is no observation: its copy stays.
    """
    value = pl.col("value").round(3).alias("_value")
    known = pl.max_horizontal("hours", "available_hours")
    kept = laboratory.join(stays.select("stay", "end_hours"), on="stay").filter(
        pl.col("hours") >= 0, known <= pl.col("end_hours")
    )
    results = kept.select("stay", "variable", "hours", value, _found=pl.lit(True))
    matched = charted.with_columns(value).sort("hours").join_asof(
        results.sort("hours"),
        on="hours",
        by=["stay", "variable", "_value"],
        strategy="nearest",
        tolerance=COPY_HOURS,
        check_sortedness=False,
    )  # fmt: skip
    copy = pl.col("lab_copy") & pl.col("_found").fill_null(False)
    return refuse(matched, copy, "copy-of-lab", tally).drop("_value", "_found", "lab_copy")


def with_lab_delay(
    rows: pl.DataFrame, dictionary: pl.DataFrame, delay: float | None
) -> pl.DataFrame:
    """Laboratory rows that are available when the source says, else after a delay.

    `rows` has itemid, hours and available_hours (null: the source does not say). `dictionary`:
    itemid, label, fluid and category of D_LABITEMS. `delay`: hours, the same for all results; None:
    `LAB_DELAY_HOURS`.
    """
    by_item = dictionary.select(
        "itemid",
        _delay=pl.when(pl.col("category").str.to_lowercase() == "blood gas")
        .then(pl.lit(LAB_DELAY_HOURS["blood gas"]))
        .otherwise(pl.lit(LAB_DELAY_HOURS["other"])),
    )
    rows = rows.join(by_item, on="itemid", how="left", maintain_order="left")
    hours = pl.col("_delay").fill_null(LAB_DELAY_HOURS["other"]) if delay is None else delay
    return rows.with_columns(
        available_hours=pl.coalesce("available_hours", pl.col("hours") + hours)
    ).drop("_delay")


def with_specimen(rows: pl.DataFrame) -> pl.DataFrame:
    """Laboratory rows with `arterial`: whether the laboratory noted an arterial specimen.

    `rows` has stay, itemid, hours and text, among them those of the specimen type.
    """
    noted = rows.filter(
        pl.col("itemid").is_in(_SPECIMEN_TYPES),
        pl.col("text").str.to_uppercase().str.starts_with("ART"),
    )
    noted = noted.select("stay", "hours", arterial=pl.lit(True)).unique()
    return rows.join(noted, on=["stay", "hours"], how="left", maintain_order="left").with_columns(
        pl.col("arterial").fill_null(False)
    )


def lab_observations(
    rows: pl.DataFrame, items: pl.DataFrame, tally: Tally
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Observations among laboratory results, and the other rows.

    `rows`: stay, itemid, hours, available_hours, text, number, arterial. `items`: see
    `lab_observation_items`. A pH that is not known to be arterial is a fallback; such a saturation
    is none of the variable, and stays with the other rows.
    """
    venous_saturation = (pl.col("itemid") == _SATURATION) & ~pl.col("arterial")
    is_variable = pl.col("itemid").is_in(items["itemid"].implode()) & ~venous_saturation
    observed = rows.filter(is_variable).join(items, on="itemid", maintain_order="left")
    observed = observed.with_columns(
        value=pl.coalesce(number(pl.col("text")), "number"),
        priority=pl.when((pl.col("itemid") == _PH) & ~pl.col("arterial"))
        .then(pl.lit(1, pl.Int8))
        .otherwise("priority"),
    )
    observed = refuse(observed, pl.col("value").is_null(), "text-result", tally)
    return observed.select(_OBSERVATION), rows.filter(~is_variable)


def lab_events(
    rows: pl.DataFrame, dictionary: pl.DataFrame, tally: Tally
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and their codes of laboratory results with a number.

    `rows`: stay, itemid, hours, available_hours, text, number, unit, arterial. `dictionary`:
    itemid, label, fluid and category of D_LABITEMS. The codes of `training.data.codes` are used
    where analyte, specimen and unit agree: partial pressures only for an arterial specimen.
    """
    known = load("mimic_labs", itemid=pl.Int32, arterial=pl.Int8).select(
        "itemid", usual="unit", _code="code", _arterial=pl.col("arterial") == 1
    )
    rows = rows.with_columns(
        value=pl.coalesce(number(pl.col("text")), "number"), variable=pl.lit("lab")
    )
    rows = refuse(rows, pl.col("value").is_null(), "text-result", tally)
    rows = rows.join(known, on="itemid", how="left", maintain_order="left")
    own = "MIMIC/LAB/" + pl.col("itemid").cast(pl.String)
    shared = pl.col("_code").is_not_null() & (pl.col("arterial") | ~pl.col("_arterial"))
    rows = in_usual_unit(rows.with_columns(code=pl.when(shared).then("_code").otherwise(own)))
    fluid = pl.col("fluid").str.to_lowercase()
    label = _words(pl.col("label"))
    descriptors = dictionary.select(
        "itemid",
        descriptor=pl.when(label.str.contains(fluid, literal=True))
        .then(label)
        .otherwise(label + " in " + fluid),
    )
    codes = _codes(rows, descriptors, default_unit="1")
    names = {code: info.descriptor for code, info in CODES.items()}
    units = {code: info.unit for code, info in CODES.items()}
    base = pl.col("code").str.replace("//.*", "")
    codes = codes.with_columns(
        descriptor=base.replace_strict(names, default=pl.col("descriptor")),
        unit=pl.col("code").replace_strict(units, default=pl.col("unit")),
    )
    return rows.select(_EVENT), codes


def interval_events(
    rows: pl.DataFrame, labels: pl.DataFrame, kind: str, table: str, tally: Tally
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Start and end events of infusions (`kind` INPUT) or procedures (PROCEDURE), and their codes.

    `rows`: stay, itemid, start and end (hours), rate and amount (numbers), unit (of the rate),
    order (which orders belong together), status, cancelled. `labels`: itemid, label of D_ITEMS. An
    event is known at its own time. A start has the rate as its value; the amount is known only at
    the end. A dose or a change of the rate has no end of its own. Orders that were rewritten or
    cancelled never happened.
    """
    rows = rows.with_columns(variable=pl.lit(table))
    rows = refuse(rows, pl.col("status") == "Rewritten", "rewritten", tally)
    rows = refuse(rows, pl.col("cancelled") > 0, "cancelled", tally)
    rows = refuse(rows, pl.col("end") < pl.col("start"), "end-before-start", tally)
    rows = refuse(rows, pl.col("amount") < 0, "negative-amount", tally)

    usual = load("mimic_infusions", itemid=pl.Int32).select("itemid", usual="unit")
    starts = in_usual_unit(
        rows.join(usual, on="itemid", how="left", maintain_order="left").with_columns(
            code=f"MIMIC/{kind}_START/" + pl.col("itemid").cast(pl.String),
            hours="start",
            value="rate",
        )
    )
    goes_on = rows.select("stay", "itemid", "order", end="start").unique()
    ends = (
        rows.filter(pl.col("end") - pl.col("start") > _ONE_MINUTE)
        .join(goes_on, on=["stay", "itemid", "order", "end"], how="anti")
        .with_columns(
            code=f"MIMIC/{kind}_END/" + pl.col("itemid").cast(pl.String),
            hours="end",
            value=pl.lit(None, pl.Float64),
            usual=pl.lit(None, pl.String),
        )
    )
    label = _words(pl.col("label"))
    started = _codes(starts, labels.select("itemid", descriptor=label + " started"))
    ended = _codes(ends, labels.select("itemid", descriptor=label + " ended"))
    at_once = pl.lit(None, pl.Float64).alias("available_hours")
    events = pl.concat(
        [starts.with_columns(at_once).select(_EVENT), ends.with_columns(at_once).select(_EVENT)]
    )
    return events, pl.concat([started, ended])


def _codes(
    rows: pl.DataFrame, descriptors: pl.DataFrame, default_unit: str | None = None
) -> pl.DataFrame:
    """One row for each code of the rows: code, descriptor, unit."""
    used = rows.select("code", "itemid", "usual").unique(["code"], keep="first")
    named = used.join(descriptors, on="itemid", how="left")
    item = pl.lit("item ") + pl.col("itemid").cast(pl.String)
    return named.select(
        "code",
        descriptor=pl.coalesce("descriptor", item),
        unit=pl.col("usual").fill_null(default_unit) if default_unit else "usual",
    ).sort("code")


def _words(label: pl.Expr) -> pl.Expr:
    """A label in plain lower-case words."""
    plain = label.str.to_lowercase().str.replace_all(r"[^a-z0-9%/+.'-]+", " ")
    return plain.str.strip_chars()
